"""The report of a run says what its files say, on a page that needs nothing else; what is missing is named."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.runs.files import write_arrays, write_atomic
from ctrl_diffusion.runs.images import mosaic
from experiments.digits.report import write_report
from experiments.digits.results import load_run, number
from experiments.figures import series
from experiments.report import main

CONFIG = {"reward": "digit", "digit": 3, "kl_weight": 0.5, "eta": 1.0, "steps": 4, "iterations": 3, "kl_budget": None}
METRICS = {
    "relative_gap": 0.1312, "optimality_gap": 0.48, "optimality_gap_se": 0.024, "objective": -1.88, "objective_se": 0.02,
    "optimum": -1.4, "optimum_se": 0.013, "optimum_is_bound": False, "effective_sample_size": 1830.4, "optimum_samples": 16384,
    "optimum_path_kl": 2.015, "optimum_reward": -0.3925, "reward": -0.941, "reward_se": 0.0153, "reward_reference": -5.06,
    "reward_reference_se": 0.031, "objective_reference": -5.06, "path_kl": 1.878, "path_kl_se": 0.0142, "held_out_reward": -1.19,
    "held_out_reward_reference": -4.84, "diversity": 41.27, "diversity_reference": 210.4, "diversity_optimum": 52.8,
    "diversity_data": 231.2, "wall_seconds": 179.8, "pretrain_seconds": 81.25, "finetune_seconds": 97.9,
    "network_evaluations": 41234432, "peak_rss_bytes": 1234567890, "iterations": 3, "stop_reason": "finished",
}  # fmt: skip
NO_GAP = dict.fromkeys(
    ("relative_gap", "optimality_gap", "optimality_gap_se", "objective", "objective_se", "path_kl", "path_kl_se")
)


def history(gap: bool = True) -> list[dict]:
    rows = [{"phase": "pretrain", "step": 10 * i, "loss": 1 / i, "wall_seconds": float(i)} for i in (1, 2)]
    for i in range(3):
        row = {"phase": "finetune", "iteration": i, "wall_seconds": 2.0 + i, "reward": -5.0 + i, "held_out_reward": -4.0 + i}
        row |= {"value_explained_variance": 0.3 * i, "update_kl": 0.02, "clip_fraction": None}
        rows.append(row | ({"path_kl": 0.5 * i} if gap else {}))
    rows[-1] |= {"evaluation_reward": -1.0, "evaluation_reward_se": 0.1}
    rows[-1] |= {"evaluation_path_kl": 1.8, "relative_gap": 0.14, "relative_gap_se": 0.02} if gap else {}
    return rows


@pytest.fixture
def directory(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    samples = {name: rng.uniform(-1.1, 1.1, (9, 4, 4, 1)) for name in ("before", "after", "optimum")}
    samples |= {f"rewards_{name}": rng.normal(size=9) for name in ("before", "after", "optimum")}
    samples |= {f"histogram_{name}": np.full(10, 0.1) for name in ("before", "after", "optimum")}
    path = tmp_path / "a run"
    path.mkdir()
    write_arrays(path / "samples.npz", samples)
    put(path, CONFIG, METRICS, history())
    return path


@pytest.fixture
def quick(monkeypatch):
    """Figures are laid out and filled but not drawn, which takes most of the time."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    monkeypatch.setattr("experiments.digits.report.png", lambda figure: file.getvalue())


def put(path: Path, config: dict, metrics: dict, rows: list[dict]) -> None:
    write_atomic(path / "config.json", json.dumps(config))
    write_atomic(path / "metrics.json", json.dumps(metrics))
    write_atomic(path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Visible text, tags with attributes, and whether every element that was opened was closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.words, self.tags, self.open, self.notes = path.read_text(encoding="utf-8"), [], [], [], []
        self.feed(self.source)
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if "aside" in self.open:
                self.notes.append(data)

    def images(self) -> list[Image.Image]:
        prefix = "data:image/png;base64,"
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith(prefix) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :], validate=True))) for source in sources]


def test_the_numbers_are_on_the_page_with_errors_and_units(directory, quick):
    page = Page(write_report(directory))
    closed = "closed 86.88 ± 0.66 % of the distance from the reference to the optimum: relative optimality gap 0.1312 ± 0.0066"
    assert closed in page.text  # 0.024 / (5.06 - 1.4) = 0.0066
    assert "The mean reward rose from −5.060 ± 0.031 to −0.941 ± 0.015 nats, at a path KL of 1.878 ± 0.014 nats." in page.text
    for text in (
        "−1.880 ± 0.020 nats",
        "−1.400 ± 0.013 nats",
        "41.27 images",
        "λ = 0.5",
        "41,234,432",
        "3 min 0 s",
        "1,177 MiB",
    ):
        assert text in page.text, text
    for name in METRICS:
        assert name.removesuffix("_se") in page.text, name
    for name, value in CONFIG.items():
        assert f"<code>{name}</code></td><td>{value}</td>" in page.source
    assert page.notes == []  # nothing to warn of
    assert "The held-out reward is" in page.text
    put(directory, CONFIG, METRICS, [{**row, "held_out_reward": None} for row in history()])
    assert "The held-out reward is" not in Page(write_report(directory)).text


def test_the_page_needs_nothing_else(directory):
    page = Page(write_report(directory))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", re.sub(r"base64,[^\"]*", "", page.source))
    images = page.images()
    assert len(images) == 3 + 3 + 1 + 3  # grids, curves, classes, diagnostics
    for image in images:
        image.load()
        assert image.size[0] >= 600 and np.ptp(np.asarray(image.convert("L"))) > 200
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert ("html", {"lang": "en"}) in page.tags and any(a.get("name") == "viewport" for t, a in page.tags if t == "meta")
    written = {"samples.png", "curves.png", "classes.png", "report.html"}
    assert {path.name for path in directory.iterdir()} == {
        *written,
        "config.json",
        "metrics.json",
        "history.jsonl",
        "samples.npz",
    }
    for name in written - {"report.html"}:
        with Image.open(directory / name) as image:
            assert image.format == "PNG" and image.size[0] >= 1500


def test_how_to_load_and_repeat(directory, quick, monkeypatch):
    monkeypatch.chdir(directory.parent)
    page = Page(write_report(directory))
    assert 'import jax, ctrl_diffusion model = ctrl_diffusion.load("a run/model")' in page.text
    assert (
        "python -m experiments.digits --out 'a run' --reward digit --digit 3 --kl-weight 0.5 --eta 1.0 --steps 4" in page.text
    )
    assert "--kl-budget" not in page.text
    assert "python -m experiments.report 'a run'" in page.text


@pytest.mark.parametrize(
    "change, note",
    [
        ({"effective_sample_size": 31.4}, "It rests on 31 effective samples out of 16,384 (at least 100 are wanted)"),
        ({"optimum_is_bound": True}, "J* is only an upper bound."),
        ({"optimality_gap": -0.2, "relative_gap": -0.05}, "The gap is negative."),
        ({"stop_reason": "kl budget", "iterations": 2}, "The path KL exceeded its budget of 1.5 nats after 2 of 3 iterations."),
    ],
)
def test_warnings(directory, quick, change, note):
    put(directory, {**CONFIG, "kl_budget": 1.5}, {**METRICS, **change}, history())
    page = Page(write_report(directory))
    assert note in "".join(page.notes)
    assert len([tag for tag, _ in page.tags if tag == "aside"]) == 1
    assert ("closed at least 86.88" in page.text) == ("optimum_is_bound" in change)


def test_a_worse_model_is_called_worse(directory, quick):
    put(directory, CONFIG, {**METRICS, "relative_gap": 1.2, "reward": -6.0}, history())
    text = Page(write_report(directory)).text
    assert "Fine-tuning ended below the reference: relative optimality gap 1.2000 ± 0.0066" in text
    assert "The mean reward fell from −5.060 ± 0.031 to −6.000 ± 0.015 nats" in text


def test_no_gap_is_explained(directory, quick):
    put(directory, {**CONFIG, "eta": 0.0}, {**METRICS, **NO_GAP}, history(gap=False))
    page = Page(write_report(directory))
    assert "At eta = 0 the sampler is deterministic" in "".join(page.notes)
    assert "to −0.941 ± 0.015 nats. No optimality gap is defined for this run." in page.text
    assert len(page.images()) == 3 + 1 + 1 + 3  # of the curves, only the reward is left
    assert "None" not in page.text.replace("kl_budgetNone", "") and "nan" not in page.text


def test_no_kl_penalty_no_optimum(directory, quick):
    metrics = {name: v for name, v in METRICS.items() if not name.startswith(("optimum", "effective"))} | NO_GAP
    put(directory, {**CONFIG, "kl_weight": 0.0}, metrics, history(gap=False))
    page = Page(write_report(directory))
    assert "At kl_weight = 0 leaving the reference costs nothing" in "".join(page.notes)
    assert len(page.images()) == 2 + 1 + 1 + 3  # no samples at the optimum


def test_a_users_own_reward_and_colour_images(directory):
    hostile = "custom: <script>alert('&')</script>"
    metrics = {**METRICS, "stop_reason": hostile, hostile: hostile}
    put(directory, {**CONFIG, "reward": hostile, "data": "custom: (9, 4, 4, 3)", hostile: hostile}, metrics, history())
    write_arrays(directory / "samples.npz", {name: np.zeros((5, 4, 6, 3)) for name in ("before", "after", "optimum")})
    page = Page(write_report(directory))  # checks the nesting as well
    assert "<script" not in page.source and page.source.count("&lt;script&gt;") == 10
    assert "Fine-tuning a diffusion model for the reward “<script>alert('&')</script>”" in page.text
    assert "−0.941 ± 0.015 reward units" in page.text and "experiments.digits.run(config" in page.text
    assert len(page.images()) == 3 + 4 + 3  # no classes; the held-out reward, on another scale, has its own axes
    assert not (directory / "classes.png").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "history.jsonl", "samples.npz"])
def test_a_missing_or_damaged_file_is_named(directory, name, capsys):
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) - 20])
    with pytest.raises(ValueError, match=name):
        write_report(directory)
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report(directory)
    assert main([str(directory)]) == 1
    assert f"holds no {name}" in capsys.readouterr().err
    assert not (directory / "report.html").exists()


def test_the_command_line(directory, quick, capsys):
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert main([str(directory / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_non_finite_metrics_are_not_defined(directory, quick):
    put(directory, CONFIG, {**METRICS, "diversity": float("nan")}, history())
    assert load_run(directory).metrics["diversity"] is None
    assert "Effective diversitynot defined" in Page(write_report(directory)).text


def test_numbers_have_the_digits_their_errors_allow():
    assert number(-0.94123, 0.0153) == "−0.941\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.015"
    assert number(1234.5, 20.0) == "1,234\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}20"
    assert [number(v) for v in (None, True, 16384, 0.131234, 12345.6, 1e-5)] == [
        "not defined", "yes", "16,384", "0.1312", "12,346", "1e−05",
    ]  # fmt: skip


def test_mosaic_places_images_in_reading_order():
    picture = mosaic(np.stack([np.full((2, 3, 1), v) for v in (-1.0, 0.0, 3.0, np.nan)]))
    assert picture.shape == (5, 7, 3)
    assert picture[0, 0, 0] == 0 and picture[0, 4, 0] == 0.5 and picture[3, 0, 0] == 1 and picture[3, 4, 0] == 0.5
    assert (picture[2] == 1).all() and (picture[:, 3] == 1).all()


def test_series_skips_rows_without_numbers():
    x, y, se = series([{"t": 1, "y": 2, "e": 0.5}, {"t": 2}, {"t": 3, "y": None}, {"t": 4, "y": 5}], "t", "y", "e")
    assert (x.tolist(), y.tolist(), se.tolist()) == ([1, 4], [2, 5], [0.5, 0])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
