"""`ctrl_diffusion.runs`: the README's run, from the wheel alone, killed and resumed; the gap; what is refused."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import exact, runs
from ctrl_diffusion.objective import Objective
from ctrl_diffusion.parallel import Layout

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 10


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds what the wheel holds."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


SAMPLE = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
SHORT = SAMPLE.replace("steps=2000", "steps=1000").replace("iterations=40", f"iterations={ITERATIONS}")
FOREIGN = ("experiments", "tests", "torch", "matplotlib", "sklearn", "scipy.ndimage", "tyro", "tensorboardX", "wandb", "PIL")


def start(site: Path, folder: Path) -> subprocess.Popen:
    """A short run of the sample, by a user who has installed the wheel; last it prints whose package it was and what else it loaded."""
    folder.mkdir(exist_ok=True)
    told = f"\nimport sys\nprint('from', cd.__file__, [name for name in {FOREIGN} if name in sys.modules])\n"
    (folder / "own.py").write_text(SHORT + told)
    env = os.environ | {"PYTHONPATH": str(site)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "own.py"], cwd=folder, env=env, text=True, **pipes)  # pyright: ignore


def history(folder: Path) -> list[dict]:
    """The whole rows of the history, without their times."""
    file = folder / "runs" / "circle" / "history.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: v for name, v in row.items() if name != "wall_seconds"} for row in rows]


def tuned(folder: Path) -> int:
    """Iterations of fine-tuning in the history."""
    return sum(row["phase"] == "finetune" for row in history(folder))


def saved(folder: Path) -> int:
    """Iterations of the newest whole checkpoint of fine-tuning."""
    checkpoints = folder / "runs" / "circle" / "checkpoints" / "finetune"
    return max((int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()), default=0)


@pytest.mark.slow
def test_the_readme_s_own_run_is_killed_and_ends_as_one_that_was_not(site, tmp_path):
    assert len([line for line in SAMPLE.splitlines() if line.strip()]) <= 40 and f"iterations={ITERATIONS}," in SHORT
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = start(site, whole)
    out, err = run.communicate()
    assert run.returncode == 0 and "pre-training: 500/" in err, err
    assert out.splitlines()[-1] == f"from {site / 'ctrl_diffusion' / '__init__.py'} []"

    run = start(site, stopped)
    while run.poll() is None and saved(stopped) < 2:  # written beside the run, which may be further
        time.sleep(0.01)
    run.kill()  # SIGKILL
    assert run.wait() < 0, run.communicate()
    known = saved(stopped)
    assert 2 <= known and tuned(stopped) < ITERATIONS and not (stopped / "runs" / "circle" / "metrics.json").exists()

    run = start(site, stopped)
    out, err = run.communicate()
    assert run.returncode == 0, err
    resumed = re.search(rf"^fine-tuning: (\d+)/{ITERATIONS}", err, re.M)
    assert resumed and int(resumed[1]) > known, err  # neither pre-training nor the first iterations were done again
    assert "pre-training: 500/" not in err
    for name in ("model/params.safetensors", "metrics.json", "config.json"):
        assert (stopped / "runs" / "circle" / name).read_bytes() == (whole / "runs" / "circle" / name).read_bytes(), name
    assert history(stopped) == history(whole) and tuned(whole) == ITERATIONS

    metrics = json.loads((whole / "runs" / "circle" / "metrics.json").read_text())
    assert 0 < metrics["relative_gap"] < 0.9 and metrics["effective_sample_size"] > 100
    shown = f"**{metrics['relative_gap']:.3f} ± {metrics['relative_gap_se']:.3f}**"
    assert shown in out and out.startswith((whole / "runs" / "circle" / "report.md").read_text()[:200])


# --- the gap


RING = exact.ring_linear()
KEY = jax.random.key(0)


def between(params, t, x, cond):
    """The optimal action of the ring where `params` is 1, and the reference's where it is 0."""
    return (1 - params) * RING.reference_action(None, t, x) + params * RING.optimal_action(None, t, x)


def ring_objective(kl_weight=RING.kl_weight, process=RING.process, **options) -> Objective:
    sampler = cd.Sampler(process, between, RING.shape, grid=process.grid(100))
    return cd.Objective(sampler, cd.differentiable(RING.reward), kl_weight, **options)


def test_the_gap_is_one_at_the_reference_and_zero_at_the_optimum():
    """To four standard errors, and at the optimum the error of a hundred steps."""
    objective, zero, one = ring_objective(), jnp.asarray(0.0), jnp.asarray(1.0)
    start = runs.evaluate(objective, zero, zero, KEY, samples=2000, reference_samples=20_000)
    best = runs.evaluate(objective, zero, one, KEY, samples=2000, reference_samples=20_000)
    assert start["path_kl"] == 0 and abs(start["relative_gap"] - 1) < 4 * start["relative_gap_se"]
    assert abs(best["relative_gap"]) < 4 * best["relative_gap_se"] + 0.02
    assert abs(best["optimum"] - float(RING.optimal_value())) < 4 * best["optimum_se"] + 0.02
    assert abs(best["path_kl"] - best["optimum_path_kl"]) < 0.2 and not best["optimum_is_bound"]
    assert best["objective"] == pytest.approx(best["reward"] - RING.kl_weight * best["path_kl"])


@pytest.mark.slow
def test_what_is_not_defined_is_none():
    zero = jnp.asarray(0.0)
    numbers = dict(samples=8, reference_samples=8)
    free = runs.evaluate(ring_objective(kl_weight=0.0), zero, zero, KEY, **numbers)
    assert free["relative_gap"] is None and "optimum" not in free and free["objective"] == free["reward"]
    flow = cd.DiffusionProcess(RING.process.schedule, eta=0.0)
    silent = runs.evaluate(ring_objective(process=flow, exploration=cd.exploration.ActionNoise()), zero, zero, KEY, **numbers)
    assert silent["path_kl"] is None and silent["objective"] is None and silent["relative_gap"] is None
    conditions = ring_objective(conditions=lambda key, n: jax.random.randint(key, (n,), 0, 2))
    assert runs.evaluate(conditions, zero, zero, KEY, **numbers)["relative_gap"] is None


def test_evaluations_that_mean_nothing_are_refused():
    objective, zero = ring_objective(), jnp.asarray(0.0)
    with pytest.raises(ValueError, match="samples=1 and reference_samples=4096 must be at least 2"):
        runs.evaluate(objective, zero, zero, KEY, samples=1)
    costly = exact.double_well()
    sampler = cd.Sampler(costly.process, costly.optimal_action, costly.shape, grid=costly.process.grid(4))
    with pytest.raises(TypeError, match="DriftProcess may have: use a DiffusionProcess"):
        runs.evaluate(cd.Objective(sampler, cd.differentiable(costly.reward), 1.0), zero, zero, KEY)


# --- the loop


@pytest.mark.slow
def test_the_loop_without_an_evaluation_and_with_a_budget(tmp_path):
    """It stops where the path KL exceeds the budget, checkpoints that, and has nothing left to do when it is called again."""
    objective = ring_objective()
    algorithm = cd.dpok(objective, cd.Training(optax.sgd(0.02), batch=32))
    state = algorithm.init(jnp.asarray(0.0))
    run = runs.RunDirectory(tmp_path / "run", loggers=())
    end, progress = runs.finetune(run, algorithm, state, KEY, iterations=50, kl_budget=0.05)
    assert progress.stop_reason == "kl budget" and 1 < progress.iterations < 50
    rows = run.history()
    assert [row["path_kl"] > 0.05 for row in rows] == [False] * (progress.iterations - 1) + [True]
    again, same = runs.finetune(run, algorithm, state, KEY, iterations=50, kl_budget=0.05)
    assert same == progress and again.params == end.params and run.history() == rows
    assert not (tmp_path / "run" / "tensorboard").exists()
    for name in ("evaluate_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            runs.finetune(run, algorithm, state, KEY, iterations=1, **{name: 0})


def test_devices_that_cannot_be():
    with pytest.raises(
        ValueError, match="coordinator='a:1', processes=None, process=None: give all three, with distributed=True"
    ):
        runs.start_devices(coordinator="a:1")
    with pytest.raises(ValueError, match=f"count=9999 must be from 1 to {len(jax.devices())}"):
        runs.start_devices(9999)
    with pytest.raises(ValueError, match="fsdp=2 must be 1 on one device"):
        runs.start_devices(1, 2)
    assert runs.start_devices(1) == Layout()


# --- the report


def test_the_report_is_of_finished_runs_and_warns(tmp_path):
    run = runs.RunDirectory(tmp_path / "run", {"kl_weight": 0.5, "note": "a|b"}, loggers=())
    with pytest.raises(FileNotFoundError, match="holds no metrics.json: finish the run"):
        runs.write_report(run.path)
    for i in range(30):
        run.log("finetune", i + 1, {"iteration": i, "wall_seconds": 2.0 * i, "reward": 0.1 * i, "path_kl": math.nan})
    numbers = {"reward": 1.23456, "reward_se": 0.0123, "path_kl": 2.0, "objective": 0.2, "effective_sample_size": 12.0}
    run.finish(numbers | {"relative_gap": 0.25, "relative_gap_se": 0.5, "reward_reference": -1.0, "iterations": 30})
    text = runs.write_report(run.path).read_text()
    assert "The relative optimality gap is **0.25 ± 0.50**" in text and "12 effective samples" in text
    assert "| mean reward | -1 | 1.235 ± 0.012 | not defined |" in text and "| note | `a/b` |" in text
    progress = text[text.index("## Progress") : text.index("## All metrics")]
    assert progress.count("\n| ") == 2 + 11 and "| 29 | 58 | 2.9 | not defined |" in progress
    run.finish({"accuracy": 0.5})
    assert textwrap.dedent(runs.write_report(run.path).read_text()).startswith("# run\n\n## Progress")


def test_arrays_in_a_row_are_images(tmp_path):
    """Of four axes; others are the caller's mistake."""
    told = []

    class Own:
        def start(self, folder, settings):
            told.append((folder, settings))

        def log(self, phase, step, numbers, pictures):
            told.append((phase, step, dict(numbers), {name: v.shape for name, v in pictures.items()}))

        def finish(self, metrics):
            told.append(metrics)

        def close(self):
            told.append("closed")

    run = runs.RunDirectory(tmp_path / "run", {"seed": 1}, loggers=[Own()])
    run.log("own", 3, {"loss": 0.5, "samples": np.zeros((4, 2, 2, 3), np.uint8)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        run.log("own", 4, {"weights": np.zeros(3)})
    run.close()
    run.finish({"loss": 0.5})
    assert told == [(run.path, {"seed": 1}), ("own", 3, {"loss": 0.5}, {"samples": (5, 5, 3)}), "closed", {"loss": 0.5}]


def test_a_pre_training_that_diverges_is_an_error_that_says_where(tmp_path):
    process = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
    model = cd.make_model(cd.ResidualMLP((2,), (2,), width=8, depth=1, rngs=nnx.Rngs(0)), process, (2,), grid=process.grid(3))
    run, x = runs.RunDirectory(tmp_path / "run", {}), jnp.ones((4, 2))
    with pytest.raises(FloatingPointError, match=r"pre-training loss is (nan|inf) at step 20: lower learning_rate=1e"):
        runs.pretrain(run, model, x, jax.random.key(0), steps=20, batch=8, learning_rate=1e30)


# --- the folder


def test_a_finished_run_goes_on_to_more_iterations_and_not_back(tmp_path):
    def opened(iterations):
        return runs.RunDirectory(tmp_path / "run", {"seed": 1}, iterations=iterations, loggers=())

    opened(2).finish({"iterations": 2, "stop_reason": "finished"})
    assert opened(1).metrics == opened(2).metrics == {"iterations": 2, "stop_reason": "finished"}
    assert opened(5).metrics is None  # and the loop resumes from its checkpoint
    opened(5).finish({"iterations": 3, "stop_reason": "kl budget"})
    assert opened(5).metrics is not None


def test_a_start_that_failed_claims_no_folder(tmp_path):
    runs.RunDirectory(tmp_path / "run", {"model": "misspelt"})
    run = runs.RunDirectory(tmp_path / "run", {"model": "right"})
    assert run.settings == {"model": "right"}
    run.log("finetune", 1, {"reward": 1.0})
    with pytest.raises(ValueError, match=r"holds a run with other settings \(model: 'right' there, 'another' now\)"):
        runs.RunDirectory(tmp_path / "run", {"model": "another"})


def test_the_address_of_a_bucket_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = cd.make_model(
        cd.ResidualMLP((2,), (2,), width=8, depth=1, rngs=nnx.Rngs(0)), RING.process, (2,), grid=RING.process.grid(3)
    )
    for address in ("gs://bucket/run", Path("gs://bucket/run"), "s3://bucket/run"):
        for use in (runs.RunDirectory, cd.load, lambda folder: cd.save(folder, model)):
            with pytest.raises(ValueError, match="bucket/run is an address, not a folder: mount the bucket"):
                use(address)
    assert not list(tmp_path.iterdir())
