"""The main job: the whole run on a tiny budget, what it leaves behind, how it resumes, and what it refuses."""

import dataclasses
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import ctrl_diffusion as cd
from ctrl_diffusion.rewards import RewardError
from ctrl_diffusion.runs import Checkpoints
from experiments.digits import experiment as digits
from experiments.digits.__main__ import main
from experiments.reward_registry import OF_DIGITS, RewardSettings, compressed_bytes, holes, ink
from tests.tiny_runs import DIGITS

TINY = digits.Config(**DIGITS, iterations=4)
pytestmark = pytest.mark.usefixtures("classifiers", "undrawn")  # but the first report is drawn


def settings(path, **changes):
    return dataclasses.replace(TINY, out=path, **changes)


def parameters(folder):
    return jax.tree.leaves(cd.load(folder / "model").params)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, classifiers):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, digits.run(settings(out))


def test_what_a_run_leaves_behind(finished):
    out, metrics = finished
    for name in ("config.json", "metrics.json", "history.jsonl", "samples.npz", "report.html", "samples.png", "curves.png"):
        assert (out / name).stat().st_size > 0
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "metrics.json").read_text()) == metrics
    required = "relative_gap optimality_gap optimality_gap_se reward reward_se reward_reference path_kl diversity wall_seconds"
    for name in [*required.split(), "peak_rss_bytes", "held_out_reward", "effective_sample_size", "network_evaluations"]:
        assert np.isfinite(metrics[name]), name
    assert metrics["iterations"] == 4
    assert metrics["stop_reason"] == "finished"
    # paths, old and reference actions: three forward evaluations of every (time, sample) pair; one with gradient
    assert metrics["network_evaluations"] == 3 * metrics["network_gradient_evaluations"] == 3 * 4 * 24 * 4
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["phase"] == "finetune"] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if row["phase"] == "pretrain"] == [20]
    samples = np.load(out / "samples.npz")
    assert samples["before"].shape == samples["after"].shape == (64, 8, 8, 1)
    for name in ("histogram_before", "histogram_after", "histogram_optimum"):
        np.testing.assert_allclose(samples[name].sum(), 1)


def test_gap_is_the_difference_it_claims_to_be(finished):
    _, m = finished
    assert m["objective"] == pytest.approx(m["reward"] - m["path_kl"] * 1.0, abs=1e-5)
    assert m["optimality_gap"] == pytest.approx(m["optimum"] - m["objective"], abs=1e-9)
    scale = m["optimum"] - m["reward_reference"]
    assert m["relative_gap"] == pytest.approx(m["optimality_gap"] / scale, rel=1e-9)
    assert m["optimum_path_kl"] == pytest.approx(m["optimum_reward"] - m["optimum"], rel=1e-6)  # at kl_weight 1


def test_load_and_sample_in_three_lines(finished):
    out, _ = finished
    model = cd.load(out / "model")
    images = model.sample(jax.random.key(0), 5)
    assert images.shape == (5, 8, 8, 1)
    assert bool(jnp.all(jnp.isfinite(images)))
    np.testing.assert_allclose(model.sample(jax.random.key(0), 2), images[:2], atol=1e-5)  # sample i does not depend on n
    assert cd.load(out / "model", solver=cd.solvers.ExponentialEuler(), grid=model.sampler.process.grid(9)).sample(
        jax.random.key(0), 2
    ).shape == (2, 8, 8, 1)


def test_running_again_says_finished_and_changes_nothing(finished):
    out, metrics = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert digits.run(settings(out)) == metrics
    assert "finished" in printed.getvalue()
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != "config.json" and p.is_file()} == {
        p: t for p, t in before.items() if p.name != "config.json"
    }


def test_another_runs_folder_is_refused(finished):
    out, _ = finished
    before = (out / "config.json").read_text()
    with pytest.raises(ValueError, match=r"holds a run with other settings \(digit: 3 there, 4 now\)"):
        digits.run(settings(out, digit=4))
    assert (out / "config.json").read_text() == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        digits.run(settings(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_as_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        digits.run(settings(tmp_path / "file"))


class Interrupted(Exception):
    pass


def test_a_run_that_breaks_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    """Iteration 2 raises inside the reward; the same command again ends with the uninterrupted run's parameters and log."""
    out, metrics = finished
    calls = []
    make = digits.OF_DIGITS["digit"].make

    def breaking(settings):
        reward = make(settings)

        def fn(x):
            if x.shape[0] == 24:  # the final states of a training batch
                calls.append(None)
                if len(calls) == 3:
                    raise Interrupted("power cut")
            return reward.fn(x)

        return dataclasses.replace(reward, fn=fn)

    monkeypatch.setitem(digits.OF_DIGITS, "digit", digits.OF_DIGITS["digit"]._replace(make=breaking))
    rare = settings(tmp_path / "run", checkpoint_every=100)  # what is resumed was saved when the reward broke
    with pytest.raises(RewardError, match="iteration 2: reward 'digit' raised Interrupted .* power cut"):
        digits.run(rare)
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = digits.run(rare)
    assert len(calls) == 5  # iterations 0, 1, 2 (broken), 2, 3
    for a, b in zip(parameters(out), parameters(tmp_path / "run")):
        np.testing.assert_array_equal(a, b)
    assert resumed["reward"] == metrics["reward"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["phase"] == "finetune"] == [0, 1, 2, 3]


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_works(finished, tmp_path):
    out, _ = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    (run / "metrics.json").unlink()
    for file in (run / "checkpoints" / "finetune" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"finetune/4 cannot be read .* Delete that folder, .* to resume from checkpoint 3"):
        digits.run(settings(run))
    assert (run / "checkpoints" / "finetune" / "4").exists()
    digits.run(settings(run, use_previous_checkpoint=True))
    for a, b in zip(parameters(out), parameters(run)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("other", [{"w": jnp.zeros(4)}, {"v": jnp.zeros(3)}, {"w": jnp.zeros(3), "v": jnp.zeros(3)}, {}])
def test_a_checkpoint_of_something_else_is_named(tmp_path, other):
    written = Checkpoints(tmp_path / "finetune")
    written.save(1, {"w": jnp.zeros(3)}, {})
    written.close()
    with pytest.raises(ValueError, match=r"finetune/1 cannot be read \(ValueError: .*Delete that folder"):
        Checkpoints(tmp_path / "finetune").restore(other)


def test_a_checkpoint_on_its_way_when_a_run_breaks_arrives(tmp_path):
    """A hundred megabytes take longer to write than an error to be raised."""
    with pytest.raises(Interrupted, match="power cut"), Checkpoints(tmp_path / "finetune") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones((25, 10**6))}, {"seconds": 2.0})
        raise Interrupted("power cut")
    assert [folder.name for folder in (tmp_path / "finetune").iterdir()] == ["1"]


def test_a_truncated_model_is_named(finished, tmp_path):
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    file = tmp_path / "model" / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="params.safetensors is truncated"):
        cd.load(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="holds no model.json"):
        cd.load(tmp_path)


@pytest.mark.slow
def test_kl_budget_stops_the_run(tmp_path):
    """Here of a black box."""
    metrics = digits.run(settings(tmp_path / "run", reward="holes", kl_budget=1e-6, learning_rate=1e-3))
    assert np.isfinite(metrics["reward"])
    assert metrics["stop_reason"] == "kl budget"
    assert metrics["iterations"] == 2  # the first iteration still samples the reference itself


def own_reward(x: np.ndarray) -> np.ndarray:
    """Brightness of the left half, minus that of the right one."""
    return x[:, :, :4].mean(axis=(1, 2, 3)) - x[:, :, 4:].mean(axis=(1, 2, 3))


class OwnNetwork(nnx.Module):
    """A linear map, started at zero: enough to be trained."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(pixels + 1, pixels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x, t, cond=None):
        return self.dense(jnp.concatenate([x.reshape(len(x), -1), t[:, None]], axis=-1)).reshape(x.shape)


@pytest.mark.slow
def test_your_own_reward_data_and_network(tmp_path):
    images = load_digits().images[:200, :6, :6] / 8 - 1  # 6x6: shapes follow the data
    network = OwnNetwork(36, nnx.Rngs(0))
    config = settings(tmp_path / "run", kl_weight=0.05)
    metrics = digits.run(config, reward=own_reward, data=images, network=network)
    assert np.isfinite(metrics["relative_gap"])
    assert metrics["held_out_reward"] is None  # no labels, no judge
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"] == "custom: own_reward"
    with pytest.raises(ValueError, match=r"uses the network 'OwnNetwork': pass network="):
        cd.load(tmp_path / "run" / "model")
    assert cd.load(tmp_path / "run" / "model", network=network).sample(jax.random.key(0), 2).shape == (2, 6, 6, 1)


@pytest.mark.slow
def test_deterministic_sampler_has_no_gap(tmp_path):
    """Here of another black box."""
    metrics = digits.run(settings(tmp_path / "run", eta=0.0, exploration="action", reward="bytes", iterations=2))
    assert metrics["path_kl"] is None and metrics["relative_gap"] is None
    assert np.isfinite(metrics["reward"])
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("name", OF_DIGITS)
def test_rewards_by_name_are_what_they_say(name):
    choice = OF_DIGITS[name]
    reward = choice.make(RewardSettings(lambda x: jnp.log(jnp.full((len(x), 10), 0.1)), 3))
    values = cd.rewards.compute_rewards(reward, jnp.linspace(-1, 1, 128).reshape(2, 8, 8, 1))
    assert values.shape == (2,) and reward.differentiable == choice.differentiable and reward.name == name


BAD = {
    "reward": (dict(reward="hole"), r"reward='hole' is not one of digit, ink, holes, bytes."),
    "temperature": (dict(kl_weight=-1.0), r"kl_weight=-1.0 must not be negative and must be finite: it is the temperature"),
    "temperature-nan": (dict(kl_weight=float("nan")), r"kl_weight=nan must not be negative and must be finite"),
    "rate": (dict(learning_rate=-1.0), r"learning_rate=-1.0 must be above 0 and at most 1"),
    "absurd-rate": (dict(value_learning_rate=100.0), r"value_learning_rate=100.0 must be above 0"),
    "eta": (dict(eta=0.0), r"eta=0: Brownian exploration is undefined"),
    "eta-unpenalised": (dict(eta=0.0, algorithm="ddpo"), r"the sampler is an ODE, whose paths have no likelihood"),
    "eta-budget": (dict(eta=0.0, kl_budget=1.0), r"kl_budget=1.0: at eta=0 there is no path KL to limit"),
    "eta-sign": (dict(eta=-1.0), r"eta=-1.0 must be at least 0"),
    "digit": (dict(digit=11), r"digit=11 must be from 0 to 9"),
    "steps": (dict(steps=0), r"steps=0 must be at least 1"),
    "budget": (dict(kl_budget=0.0), r"kl_budget=0.0 must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        digits.run(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_bad_reward_ends_the_run_with_one_error_and_keeps_what_there_was(tmp_path):
    config = settings(tmp_path / "run", kl_weight=1.0)
    with pytest.raises(RewardError, match="returned nan for sample 0"):
        digits.run(config, reward=lambda x: np.full(len(x), np.nan))
    assert not (tmp_path / "run").exists()  # it was tried on two images before anything began
    with pytest.raises(RewardError, match="returned nan for sample 0"):
        digits.run(config, reward=lambda x: np.full(len(x), np.nan if len(x) > 2 else 0.0))
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "reference" / "model.json").exists()  # pre-training is not lost


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered")  # in NumPy, of the rewards
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    """The squares of rewards of iteration 2 are beyond float32; the same command goes on from where iteration 1 ended."""
    config, calls = settings(tmp_path / "run", kl_weight=1.0), []

    def reward(x):
        if len(x) == 24:  # the final states of a training batch
            calls.append(None)
        return np.resize([-1.0, 1.0], len(x)) * (3e38 if len(calls) == 3 else 1.0)

    with pytest.raises(FloatingPointError, match=r"_loss is (inf|nan) in iteration 2 \(no final state is not finite\)"):
        digits.run(config, reward=reward)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert max(int(folder.name) for folder in (tmp_path / "run" / "checkpoints" / "finetune").iterdir()) == 2
    digits.run(config, reward=reward)
    assert len(calls) == 5  # iterations 0, 1, 2 (broken), 2, 3
    assert all(np.isfinite(v).all() for v in parameters(tmp_path / "run"))


def test_the_command_line_explains_itself_and_reports_errors(tmp_path):
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = printed.getvalue()
    assert stop.value.code == 0
    for field in dataclasses.fields(digits.Config):
        assert f"--{field.name.replace('_', '-')}" in text
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert main(["--out", str(tmp_path / "run"), "--digit", "10"]) == 1
    assert errors.getvalue() == "error: digit=10 must be from 0 to 9.\n"
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit):
        main(["--iteration", "5"])
    assert "--iterations" in errors.getvalue()


def test_ink_counts_pixels():
    x = jnp.full((3, 8, 8, 1), -1.0).at[1].set(1.0).at[2, :2, :4].set(0.0)
    np.testing.assert_allclose(ink(x), [0, 64, 4])


def test_holes_are_counted_as_a_person_would():
    def picture(*rows):
        return np.array([[1.0 if c == "#" else -1.0 for c in row] for row in rows])[..., None]

    eight = picture(" ###  ", " # #  ", " ###  ", " # #  ", " ###  ", "      ")
    ring = picture(" ###  ", " # #  ", " # #  ", " # #  ", " ###  ", "      ")
    open_ring = picture(" ###  ", " # #  ", " #    ", " # #  ", " ###  ", "      ")
    at_border = picture("######", "#    #", "#    #", "######", "      ", "      ")
    diagonal = picture(" ##   ", "#  #  ", "#  #  ", " ##   ", "      ", "      ")  # 4-neighbours: a diagonal wall holds
    blank = picture(*["      "] * 6)
    np.testing.assert_array_equal(holes(np.stack([eight, ring, open_ring, at_border, diagonal, blank])), [2, 1, 0, 1, 1, 0])
    images, labels = load_digits(return_X_y=True)
    count = holes((images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32))
    assert count[labels == 0].mean() > 0.7 > 0.1 > count[labels == 1].mean()


def test_compressed_bytes_prefer_simple_images():
    noise = np.random.default_rng(0).uniform(-1, 1, (8, 8, 1))
    values = compressed_bytes(np.stack([np.full((8, 8, 1), -1.0), noise]))
    assert values[0] > -20 and values[1] < -40
