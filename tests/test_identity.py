"""What makes a run another one: its settings, the source of its reward, the content of its folders; and the hub's cache."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from huggingface_hub import constants

import ctrl_diffusion as cd
from ctrl_diffusion.image_rewards import RemoteScores
from ctrl_diffusion.pretrained import find_folder
from ctrl_diffusion.runs import Evaluator, RunDirectory, finetune, folder_digest, source_digest
from experiments.commandline import execute


def start(path, **changes):
    settings = dict(settings={"seed": 0}, about={"accumulation": 1}, evaluation={"samples": 8}) | changes
    return RunDirectory(path, **settings, loggers=[])


def test_how_a_run_is_computed_does_not_make_it_another(tmp_path):
    """It is written beside what does, and a run that has begun goes on with other values of it."""
    run = start(tmp_path / "run")
    assert run.settings == {"seed": 0, "accumulation": 1, "samples": 8}
    run.log("finetune", 0, {"reward": 1.0})
    assert start(tmp_path / "run", about={"accumulation": 4}).settings == {"seed": 0, "accumulation": 4, "samples": 8}
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        start(tmp_path / "run", settings={"seed": 1})


def test_a_finished_run_is_evaluated_again_with_other_settings_of_it(tmp_path, capsys):
    start(tmp_path / "run").finish({"reward": 1.0})
    assert start(tmp_path / "run", about={"accumulation": 2}).metrics == {"reward": 1.0}
    assert start(tmp_path / "run", evaluation={"samples": 16}).metrics is None
    assert "evaluated otherwise (samples: 8 there, 16 now): evaluating it again" in capsys.readouterr().out


def made(text):
    """A function of this source."""
    names: dict = {}
    exec(compile(text, "<string>", "exec"), names)
    return names["reward"]


def test_a_reward_is_told_by_its_source(tmp_path, monkeypatch):
    """In every form that a reward may have; the library's own have none."""
    monkeypatch.syspath_prepend(tmp_path)
    texts = ["def reward(x):\n    return x[:, 0]\n", "def reward(x):\n    return x[:, 1]\n"]
    found = []
    for i, text in enumerate(texts):
        (tmp_path / f"module_{i}.py").write_text(text)
        reward = __import__(f"module_{i}").reward
        forms = (reward, cd.black_box(reward), cd.differentiable(reward), functools.partial(reward))
        assert len({source_digest(form) for form in forms}) == 1
        found.append(source_digest(reward))
    assert None not in found and found[0] != found[1]
    assert source_digest(made(texts[0])) is None  # no source is kept
    assert source_digest(RemoteScores("http://localhost:1")) is None


def test_folders_are_told_by_content_and_not_by_place(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a" / "unet").mkdir(parents=True)
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "unet" / "weights").write_bytes(rng.bytes(3_000_000))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "download.lock").write_text("")
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    before = folder_digest(tmp_path / "b")
    (tmp_path / "b" / "unet" / "weights").write_bytes(rng.bytes(3_000_000))
    assert folder_digest(tmp_path / "b") != before
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "model.json")
    assert folder_digest(tmp_path / "a") != before


def test_a_hub_id_is_found_in_the_cache_on_disk(tmp_path, monkeypatch):
    """A snapshot as the hub's own program lays it out; nothing is downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == snapshot and find_folder(snapshot) == snapshot
    for name, error, message in (
        ("owner/other", FileNotFoundError, r"no model in the hub's cache, .*hf download owner/other\), or give a folder"),
        ("no such folder", FileNotFoundError, "no such folder is not a folder"),
        ("models--owner--name/refs/main", ValueError, "is a single file: .*from_single_file"),
        ("gs://bucket/model", ValueError, "is an address, not a folder"),
    ):
        with pytest.raises(error, match=message):
            find_folder(name)


def test_an_interrupt_says_what_comes_next(capsys):
    def run(config):
        raise KeyboardInterrupt

    assert execute(run, dict[str, int], None, "experiments.digits", []) == 130
    assert (
        capsys.readouterr().err
        == "\ninterrupted: run the same command again; it goes on from what it had written, if anything.\n"
    )


# -- rewards, before anything long begins, and their gradients ------------------------------------------------------------------


def test_a_reward_is_tried_on_two_samples():
    x, seen = jnp.ones((2, 3)), []
    cd.rewards.try_reward(cd.black_box(lambda x: seen.append(x.shape) or x[:, 0]), x)
    assert seen == [(2, 3)]
    cd.rewards.try_reward(cd.differentiable(lambda x: x[:, 0]), x)
    wrong = {
        r"returned shape \(2, 3\) for a batch of 2 samples": lambda x: x,
        "raised AttributeError on a batch of": lambda x: x.nothing,
    }
    for message, fn in wrong.items():
        for reward in (cd.black_box(fn), cd.differentiable(fn)):
            with pytest.raises(cd.rewards.RewardError, match=message):
                cd.rewards.try_reward(reward, x)


def test_a_gradient_that_is_not_finite_is_named():
    """Of a norm at 0; where the value is not finite either, the gradient is not the fault."""
    x = jnp.asarray([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    norm = cd.differentiable(lambda x: jnp.sqrt(jnp.sum(x**2, axis=1)), "norm")
    fault = cd.rewards.gradient_fault(norm, x)
    assert fault is not None and fault.startswith("the gradient of reward 'norm' is not finite at sample 1 (1 of 3)")
    assert cd.rewards.gradient_fault(norm, x[::2]) is None
    assert cd.rewards.gradient_fault(cd.differentiable(lambda x: jnp.log(x[:, 0])), x) is None
    assert cd.rewards.gradient_fault(cd.black_box(lambda x: x[:, 0]), x) is None


def test_a_run_whose_gradient_is_not_finite_names_the_reward(tmp_path):
    """Its value is 0 everywhere."""
    process = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
    sampler = cd.Sampler(process, lambda params, t, x, cond: -params * x, (2,), grid=process.grid(2))
    root = cd.differentiable(lambda x: jnp.sqrt(0 * x[:, 0]), "root")
    algorithm = cd.draft(cd.Objective(sampler, root, 0.0), cd.Training(optax.sgd(1e-3), 4))
    with pytest.raises(
        FloatingPointError, match="in iteration 0 .*The cause: the gradient of reward 'root' is not finite at sample 0"
    ):
        finetune(start(tmp_path / "run"), algorithm, algorithm.init(jnp.ones(2)), jax.random.key(0), iterations=1)


def test_reference_samples_are_kept(tmp_path):
    """A later start asks the reward nothing again."""
    asked = []

    def reward(x):
        asked.append(len(x))
        return x[:, 0]

    process = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
    sampler = cd.Sampler(process, lambda params, t, x, cond: -x, (2,), grid=process.grid(2))
    key, file = jax.random.key(0), tmp_path / "kept" / "reference.npz"
    for _ in range(2):
        evaluator = Evaluator(sampler, cd.black_box(reward), (), None, 4)
        found = evaluator.reference_samples(key, 8, file=file)
    assert asked == [4, 4]
    again = evaluator.reference_samples(key, 8)
    np.testing.assert_array_equal(found.x, again.x)
    np.testing.assert_array_equal(found.rewards, again.rewards)
    assert len(evaluator.reference_samples(key, 4, file=file).x) == 4
