"""What a run logs, and where: JSON lines and TensorBoard always, Weights & Biases if asked, from one process."""

import importlib.machinery
import json
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments import rundir
from experiments.rundir import RunDirectory

ROWS = [
    {"reward": 1.5, "loss": float("nan"), "stop": "no", "iteration": 0},
    {"reward": 2.5, "loss": 0.5, "stop": "no", "iteration": 1},
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
    module.init, module.calls = init, calls
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def logged(folder, project=None):
    run = RunDirectory(folder, {"seed": 3}, wandb=project)
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


def events(folder):
    """Scalars in TensorBoard's files: length, checksum, message, checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 12 + size + 4
    return found


def test_json_lines_and_tensorboard_have_the_same_numbers(tmp_path):
    logged(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows == [{"phase": "finetune", **row} for row in (ROWS[0] | {"loss": None}, ROWS[1])]
    numbers = [
        (f"finetune/{name}", i + 1, v) for i, row in enumerate(rows) for name, v in row.items() if isinstance(v, int | float)
    ]
    assert events(tmp_path / "run") == numbers
    assert not (tmp_path / "run" / "wandb").exists()


def test_weights_and_biases_gets_them_too_if_asked(tmp_path, wandb):
    logged(tmp_path / "run", "a project")
    (_, settings), metric, first, second, (_, summary) = wandb.calls
    assert settings["project"] == "a project" and settings["config"] == {"seed": 3} and settings["resume"] == "allow"
    assert settings["dir"] == str(tmp_path / "run") and settings["id"] == (tmp_path / "run" / "wandb" / "id.txt").read_text()
    assert metric == ("metric", "finetune/*", "finetune/step")
    assert first == ("log", {"finetune/reward": 1.5, "finetune/iteration": 0, "finetune/step": 1})
    assert second == ("log", {"finetune/reward": 2.5, "finetune/loss": 0.5, "finetune/iteration": 1, "finetune/step": 2})
    assert summary == {"reward": 2.5, "gap": None}


def test_a_resumed_run_is_the_same_run_there_and_a_finished_one_is_left_alone(tmp_path, wandb):
    RunDirectory(tmp_path / "run", {}, wandb="p")
    logged_once = RunDirectory(tmp_path / "run", {}, wandb="p")
    assert wandb.calls[0] == wandb.calls[1]
    logged_once.finish({})
    RunDirectory(tmp_path / "run", {}, wandb="p")
    assert [name for name, *_ in wandb.calls] == ["init", "init", "finish"]


def test_what_stands_in_the_way_is_said_before_anything_is_written(tmp_path, wandb, monkeypatch):
    with pytest.raises(ValueError, match="wandb='refused': no API key. Run `wandb login`, or set WANDB_MODE=offline"):
        RunDirectory(tmp_path / "run", {}, wandb="refused")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb='p': Weights & Biases is not installed: pip install wandb"):
        RunDirectory(tmp_path / "other", {}, wandb="p")
    assert not (tmp_path / "other").exists()


def test_only_the_first_process_logs(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(rundir, "is_first", lambda: False)
    logged(tmp_path / "run", "p")
    assert wandb.calls == [] and not (tmp_path / "run").exists()
