"""What a run logs, and where: JSON lines and TensorBoard, Weights & Biases if asked, from one process; and how far it is."""

import importlib.machinery
import io
import json
import struct
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from ctrl_diffusion.runs import ProgressBar, RunDirectory, TensorBoard, WeightsAndBiases, directory, progress
from ctrl_diffusion.runs.images import as_bytes, mosaic

IMAGES = np.linspace(-1, 1, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5, 1)
ROWS = [
    {"reward": 1.5, "loss": float("nan"), "stop": "no", "iteration": 0},
    {"reward": 2.5, "loss": 0.5, "stop": "no", "iteration": 1, "samples": IMAGES},
]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: records what it is told."""
    calls = []

    class Run:
        def __init__(self):
            self.summary = {}

        def define_metric(self, name, step_metric):
            calls.append(("metric", name, step_metric))

        def log(self, numbers):
            calls.append(("log", numbers))

        def finish(self):
            calls.append(("finish", self.summary))

    def init(**settings):
        if settings["project"] == "refused":
            raise RuntimeError("no API key")
        calls.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.calls, module.Image = init, calls, lambda picture: ("image", picture.shape)
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def loggers(project):
    return [TensorBoard(), WeightsAndBiases(project)]


def logged(folder, project=None):
    run = RunDirectory(folder, {"seed": 3}, loggers=None if project is None else loggers(project))
    for row in ROWS:
        run.log("finetune", row["iteration"] + 1, row)
    run.close()
    run.finish({"reward": 2.5, "gap": None})


def test_a_row_that_is_not_whole_is_dropped(tmp_path):
    """As a full disk leaves it: the run goes on from the checkpoint before."""
    logged(tmp_path / "run")
    file = tmp_path / "run" / "history.jsonl"
    rows = RunDirectory(tmp_path / "run", {"seed": 3}).history()
    assert len(rows) == len(ROWS) > 1
    file.write_text(file.read_text()[:-9])
    run = RunDirectory(tmp_path / "run", {"seed": 3})
    assert run.history() == rows[:-1]
    run.keep_history("finetune", "iteration", 100)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:-1]


def checksum(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def events(folder):
    """What TensorBoard's files hold, as another package reads them: length, checksum, message, checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        assert file.name.startswith("events.out.tfevents.")
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            message = data[at + 12 : at + 12 + size]
            assert data[at + 8 : at + 12] == checksum(data[at : at + 8])
            assert data[at + 12 + size : at + 16 + size] == checksum(message)
            event = Event.FromString(message)
            assert event.file_version == ("brain.Event:2" if at == 0 else "") and event.wall_time > 1e9
            found += [(value.tag, event.step, value) for value in event.summary.value]
            at += 16 + size
    return found


def test_json_lines_and_tensorboard_have_the_same_numbers(tmp_path):
    logged(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    first, second = ROWS[0] | {"loss": None}, {name: v for name, v in ROWS[1].items() if name != "samples"}
    assert rows == [{"phase": "finetune", **row} for row in (first, second)]
    numbers = [
        (f"finetune/{name}", i + 1, v) for i, row in enumerate(rows) for name, v in row.items() if isinstance(v, int | float)
    ]
    found = events(tmp_path / "run")
    assert [(tag, step, v.simple_value) for tag, step, v in found if v.HasField("simple_value")] == numbers
    assert not (tmp_path / "run" / "wandb").exists()


def test_tensorboard_gets_images_as_one_picture(tmp_path):
    logged(tmp_path / "run")
    ((tag, step, value),) = [event for event in events(tmp_path / "run") if event[2].HasField("image")]
    picture = as_bytes(mosaic(IMAGES))
    assert (tag, step) == ("finetune/samples", 2)
    assert (value.image.height, value.image.width, value.image.colorspace) == (*picture.shape[:2], 3)
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), picture)
    assert picture[0, 0].tolist() == [0, 0, 0] and picture[:4, 5].min() == 255  # the darkest pixel, and the line beside it


def test_large_steps_and_several_files_are_read(tmp_path):
    for _ in range(2):
        run = RunDirectory(tmp_path / "run", {})
        run.log("pretrain", 2**40 + 300, {"loss": 0.25, "Ω": 3})
        run.close()
        run.log("pretrain", 5, {"loss": 0.5})
        run.close()
    found = [(tag, step, value.simple_value) for tag, step, value in events(tmp_path / "run")]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 4
    assert found == [("pretrain/loss", 2**40 + 300, 0.25), ("pretrain/Ω", 2**40 + 300, 3), ("pretrain/loss", 5, 0.5)] * 2


def test_weights_and_biases_gets_them_too_if_asked(tmp_path, wandb):
    logged(tmp_path / "run", "a project")
    (_, settings), metric, first, second, (_, summary) = wandb.calls
    assert settings["project"] == "a project" and settings["config"] == {"seed": 3} and settings["resume"] == "allow"
    assert settings["dir"] == str(tmp_path / "run") and settings["id"] == (tmp_path / "run" / "wandb" / "id.txt").read_text()
    assert metric == ("metric", "finetune/*", "finetune/step")
    assert first == ("log", {"finetune/reward": 1.5, "finetune/iteration": 0, "finetune/step": 1})
    numbers = {"finetune/reward": 2.5, "finetune/loss": 0.5, "finetune/iteration": 1, "finetune/step": 2}
    assert second == ("log", numbers | {"finetune/samples": ("image", mosaic(IMAGES).shape)})
    assert summary == {"reward": 2.5, "gap": None}


def test_a_resumed_run_is_the_same_run_there_and_a_finished_one_is_left_alone(tmp_path, wandb):
    RunDirectory(tmp_path / "run", {}, loggers=loggers("p"))
    logged_once = RunDirectory(tmp_path / "run", {}, loggers=loggers("p"))
    assert wandb.calls[0] == wandb.calls[1]
    logged_once.finish({})
    RunDirectory(tmp_path / "run", {}, loggers=loggers("p"))
    assert [name for name, *_ in wandb.calls] == ["init", "init", "finish"]


def test_what_stands_in_the_way_is_said_before_anything_is_written(tmp_path, wandb, monkeypatch):
    with pytest.raises(ValueError, match="project='refused': no API key. Run `wandb login`, or set WANDB_MODE=offline"):
        RunDirectory(tmp_path / "run", {}, loggers=loggers("refused"))
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="project='p': Weights & Biases is not installed: pip install wandb"):
        WeightsAndBiases("p")


def test_a_logger_that_was_not_started_says_so(wandb):
    for logger in loggers("p"):
        with pytest.raises(ValueError, match=r"pass it to RunDirectory\(loggers=...\), which starts it"):
            logger.log("finetune", 1, {"reward": 1.0}, {})


def test_only_the_first_process_logs(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(directory, "is_first", lambda: False)
    logged(tmp_path / "run", "p")
    assert wandb.calls == [] and not (tmp_path / "run").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of(turns, seconds, monkeypatch, brief=False):
    """What a log file gets of a loop whose turns take so many seconds."""
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBar(turns + 2, "fine-tuning", "iteration", done=2, brief=brief, file=file) as bar:
        for i in range(turns):
            now[0] += seconds
            bar.update(note=f"reward={i}")
    return file.getvalue().splitlines()


def test_a_log_file_gets_a_line_now_and_then(monkeypatch):
    """Of the first turn, then one in half a minute, and of the last; none of a brief loop."""
    assert lines_of(7, 10, monkeypatch) == [
        "fine-tuning: 3/9, 10 s/iteration, reward=0",
        "fine-tuning: 6/9, 10 s/iteration, reward=3",
        "fine-tuning: 9/9, 10 s/iteration, reward=6",
    ]
    assert len(lines_of(1000, 0.1, monkeypatch)) == 5
    assert lines_of(29, 1, monkeypatch, brief=True) == []
    assert lines_of(40, 1, monkeypatch, brief=True) == ["fine-tuning: 32/42, 1 s/iteration, reward=29"]


def test_a_terminal_gets_a_bar():
    file = Terminal()
    with ProgressBar(2, "fine-tuning", "iteration", file=file) as bar:
        bar.update()
        bar.update(note="reward=1")
    assert "\r" in file.getvalue() and "2/2" in file.getvalue() and file.getvalue().count("\n") == 1


def test_logging_loads_no_other_framework(tmp_path):
    """Packages that write TensorBoard's files load torch where it is installed, which takes seconds."""
    code = f"""
        import sys
        from ctrl_diffusion.runs import RunDirectory
        run = RunDirectory({str(tmp_path / "run")!r}, {{}})
        run.log("finetune", 1, {{"reward": 1.0}})
        run.finish({{}})
        print(sorted({{"torch", "tensorflow", "tensorboard", "tensorboardX"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and len(events(tmp_path / "run")) == 1
