"""Text to image, end to end on a tiny random model in the real folder format: through the same code as a real one."""

import dataclasses
import json
import os
import re
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd
from ctrl_diffusion.algorithms import lower
from ctrl_diffusion.parallel import ONE_DEVICE
from experiments.algorithm_registry import ALGORITHMS
from experiments.pod_plan.text_to_image import abstract_parts, planned_config, text_to_image_programs
from experiments.random_model.writer import Config as RandomModel, write_random_model
from experiments.text_to_image.__main__ import main
from experiments.text_to_image.checks import check, kl_weight_of
from experiments.text_to_image.config import Config
from experiments.text_to_image.experiment import prompt_diversity, run
from experiments.text_to_image.parts import (
    latent_shape,
    load_parts,
    make_algorithm,
    make_attention,
    make_sampler,
    network_options,
    rows_of_prompts,
    suited_attention,
)
from experiments.text_to_image.prompts import read_prompts
from experiments.text_to_image.report import MEANINGS
from experiments.text_to_image.settings import PUBLISHED

SMALL = dict(
    steps=4, batch=4, samples_per_prompt=2, iterations=2, minibatches=2, evaluation_samples=4, evaluate_every=1,
    checkpoint_every=1, evaluation_solvers=(), evaluation_steps=(), learning_rate=1e-2, reward=("brightness",),
    algorithm="dpok", kl_weight=0.0,
)  # fmt: skip
OWN = SMALL | dict(
    reward=("tests.test_text_to_image:pale",), iterations=3, evaluation_solvers=("DPMSolverPP2M",), evaluation_steps=(3,)
)


def pale(images, prompts):
    """A reward of one's own; it fails where the environment says so."""
    if (
        os.environ.get("FAIL_FROM_NOW_ON") == "1" and len(CALLS) >= 2
    ):  # after the two samples that a reward is tried on, and the first iteration
        raise RuntimeError("the judge is out")
    CALLS.append(prompts)
    assert images.shape[1:] == (32, 32, 3) and all(isinstance(prompt, str) for prompt in prompts)
    return images.mean(axis=(1, 2, 3)) + 0.01 * np.asarray([len(prompt) for prompt in prompts])


CALLS: list = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a reward of one's own, given images and prompts."""
    config = Config(out=tmp_path_factory.mktemp("text_to_image") / "run", **OWN)
    return config, run(config)


def test_a_run_leaves_everything_behind(finished):
    config, metrics = finished
    assert metrics == json.loads((config.out / "metrics.json").read_text())
    assert metrics["path_kl"] > 0 and metrics["iterations"] == 3
    assert np.isclose(metrics["gain"], metrics["reward"] - metrics["reward_before"], atol=1e-6)
    gain, se = metrics["gain"] + metrics["held_out_gain"], np.hypot(metrics["gain_se"], metrics["held_out_gain_se"])
    assert gain > 3 * se > 0  # brightness is easy
    assert metrics["objective"] == metrics["reward"]  # no price
    assert metrics["held_out_path_kl"] > 0 and metrics["diversity_before"] > 0
    assert set(MEANINGS) <= set(metrics)
    assert [(c["solver"], c["steps"], c["eta"]) for c in metrics["cells"]] == [
        ("ExponentialEuler", 4, 1.0),
        ("ExponentialEuler", 3, 1.0),
        ("DPMSolverPP2M", 4, 0.0),
    ]
    assert np.isclose(metrics["cells"][0]["reward"], metrics["reward"], atol=1e-6)
    assert {row["held_out"] for row in metrics["prompts"].values()} == {True, False}
    page = (config.out / "gallery.html").read_text()
    assert page.count("<img") >= 4 * config.evaluation_samples and "http" not in page
    rows = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(row["reward_worst_prompt"] <= row["reward"] <= row["reward_best_prompt"] for row in rows)
    for name in ("samples.png", "curves.png"):
        assert (config.out / name).stat().st_size > 10_000


def test_the_same_command_again_leaves_it_alone(finished, capsys):
    config, metrics = finished
    assert run(config) == metrics
    assert "finished" in capsys.readouterr().out


def test_lora_gives_the_images_of_the_run(finished):
    """The original folder and the last LoRA, loaded as a user would, sample what the run showed as its result."""
    config, _ = finished
    folders = sorted(path.name for path in (config.out / "lora").iterdir())
    assert folders == ["iteration_00001", "iteration_00002", "iteration_00003"]
    model = sd.load_folder(config.out / "tiny-random")
    prompts = [prompt.text for prompt in read_prompts(config)[0][:2]]
    contexts = sd.encode_prompts(model, [*prompts, ""])
    noising = model.noising
    process = noising.process(config.steps)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), 0)
    keys, prompt = cd.sample_keys(key, 4), jnp.asarray(rows_of_prompts(0, 2, 4))
    with np.load(config.out / "images.npz") as images:
        shown = {name: images[name] for name in images.files}
    assert shown["training_prompts"].tolist() == [prompts[i] for i in prompt]
    for when in ("before", "after"):
        if when == "after":
            sd.load_lora(model.unet, config.out / "lora" / folders[-1])
        denoise, params, base = (sd.split_lora if when == "after" else sd.split_full)(model.unet)
        control = sd.GuidedScore(denoise, base, contexts[:-1], contexts[-1], config.guidance, noising, process)
        sampler = cd.Sampler(process, control, (8, 8, 4), grid=noising.grid(config.steps))
        latents = eqx.filter_jit(cd.Sampler.sample)(sampler, params, keys, prompt)
        pixels = np.clip(eqx.filter_jit(lambda vae, x: vae.to_images(x))(model.vae, latents), -1, 1)
        assert (
            np.max(np.abs(np.round(127.5 * (pixels + 1)) - shown[f"training_{when}"])) <= 1
        )  # a grey level, at a rounding edge
    assert np.max(np.abs(shown["training_before"].astype(int) - shown["training_after"])) > 3


def test_a_reward_that_fails_keeps_the_state(finished, tmp_path, monkeypatch, capsys):
    """The run that goes on after its error, by the command, ends as one without."""
    args = [
        word
        for name, v in (OWN | dict(evaluation_solvers=(), evaluation_steps=())).items()
        for word in (f"--{name.replace('_', '-')}", *map(str, v if isinstance(v, tuple) else (v,)))
    ]
    CALLS.clear()
    monkeypatch.setenv("FAIL_FROM_NOW_ON", "1")
    rare = ["--evaluate-every", "9"]
    assert main(["--out", str(tmp_path / "failed"), *args, *rare]) == 1
    assert "error: iteration 1: " in (text := capsys.readouterr().err) and "the judge is out" in text
    monkeypatch.delenv("FAIL_FROM_NOW_ON")
    assert main(["--out", str(tmp_path / "failed"), *args, *rare]) == 0
    failed, whole = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "failed", finished[0].out))
    assert failed["prompts"] == whole["prompts"] and failed["path_kl"] == whole["path_kl"]  # bit for bit
    files = [
        folder / "lora" / "iteration_00003" / "pytorch_lora_weights.safetensors"
        for folder in (tmp_path / "failed", finished[0].out)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_model(RandomModel(folder / "model"))
    return Config(out=folder / "none", model=str(folder / "model"), **SMALL)


SOME = ("sqdf", "nabla_db")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
def test_algorithms_apply(tiny, train):
    """Traced, not run: control, value, decoder, reward and prompts fit the programs of every kind of algorithm."""
    assert set(SOME) <= set(ALGORITHMS)
    config = dataclasses.replace(tiny, train=train)
    parts = load_parts(config, ONE_DEVICE)
    for name in SOME if train == "lora" else ("vard",):
        chosen = dataclasses.replace(config, algorithm=name, kl_weight=0.1, minibatches=1, value="structured")
        sampler = make_sampler(chosen, parts, steps=2, eta=1.0)
        algorithm, value_params = make_algorithm(chosen, parts, sampler, ONE_DEVICE)
        lower(algorithm, parts.params, value_params)
    trained = sum(leaf.size for leaf in jax.tree.leaves(parts.params))
    rest = sum(leaf.size for leaf in jax.tree.leaves(parts.base))
    assert (trained < rest / 10) if train == "lora" else rest == 0


@pytest.mark.slow
def test_a_plan_has_the_shapes_of_a_run(tiny):
    """What is compiled for a pod, of which nothing but shapes exists, against a model that was loaded."""
    config = dataclasses.replace(tiny, steps=2, rollouts=2)
    parts, planned = load_parts(config, ONE_DEVICE), abstract_parts(config, "tiny")
    for a, b in ((parts.params, planned.params), (parts.base, planned.base), (parts.contexts, planned.contexts)):
        assert [v.shape for v in jax.tree.leaves(a)] == [v.shape for v in jax.tree.leaves(b)]
    make, params, value_params = text_to_image_programs(config, "tiny")
    algorithm = make(ONE_DEVICE, 4)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(algorithm.fixed))
    programs = lower(algorithm, params, value_params)
    assert "join" in programs
    fixed = sum(leaf.size for leaf in jax.tree.leaves((planned.base, planned.contexts, planned.empty)))
    given = jax.tree.leaves(programs["sample"].lowered.in_avals)
    assert fixed < sum(leaf.size for leaf in given) < 1.1 * fixed


def test_a_plan_does_not_take_what_suits_the_machine_it_is_made_on():
    assert network_options(planned_config({}))["attention"] is jax.nn.dot_product_attention
    assert network_options(planned_config({"attention": "cudnn"}))["attention"] is sd.flash_attention


@pytest.mark.slow
def test_guidance_is_part_of_the_policy(tiny):
    """The guided score against its definition; both branches change with the parameters."""
    parts = load_parts(tiny, ONE_DEVICE)
    sampler = make_sampler(tiny, parts, steps=4, eta=1.0)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    t, prompt = sampler.ts[1], jnp.asarray([1, 3])
    model, process, noising = parts.model, sampler.process, parts.model.noising
    params = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), parts.params)
    index = jnp.full(2, 1000 * (1 - float(t)) - 1)

    def score(params, base, guidance):
        text, none = jax.vmap(lambda c: parts.denoise(params, base, x, jnp.round(index), c))(contexts)
        return -(none + guidance * (text - none)) / process.schedule.sigma(1 - t)

    context = model.encode([parts.prompts[int(i)] for i in prompt])
    contexts = jnp.stack([context, jnp.broadcast_to(model.encode([""]), context.shape)])

    @eqx.filter_jit
    def both(params, direction, control, base):
        """The control and its definition, and their derivatives in a direction of the parameters."""
        pair = (lambda p: control(p, t, x, prompt)), (lambda p: score(p, base, 5.0))
        return [jax.jvp(fn, (params,), (direction,)) for fn in pair]

    direction = jax.tree.map(lambda v: jax.random.normal(jax.random.key(2), v.shape), params)
    (value, slope), (expected, expected_slope) = both(params, direction, sampler.control, parts.base)
    np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-2, atol=1e-2 * float(jnp.max(jnp.abs(expected_slope))))
    alone = make_sampler(dataclasses.replace(tiny, guidance=1.0), parts, steps=4, eta=1.0).control
    value, expected = eqx.filter_jit(lambda p, control, base: (control(p, t, x, prompt), score(p, base, 1.0)))(
        params, alone, parts.base
    )
    np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-3)
    assert noising.timesteps(4)[1] == round(float(index[0]))


def test_decoding_in_chunks(tiny):
    parts = load_parts(tiny, ONE_DEVICE)
    latents = jax.random.normal(jax.random.key(0), (5, 8, 8, 4))
    whole = np.clip(eqx.filter_jit(lambda vae, x: vae.to_images(x))(parts.model.vae, latents), -1, 1)
    for chunk in (2, 8):
        found = eqx.filter_jit(lambda decode, x: decode(x))(sd.decoder(parts.model.vae, chunk), latents)
        np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.slow
def test_attention_in_chunks(tiny):
    """The same score, in which no more than 16 of the 64 pixels attend at a time."""
    x, prompt, found = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.asarray([0, 1]), []
    for chunk, rows in ((None, 64), (16, 16)):
        config = dataclasses.replace(tiny, attention_chunk=chunk)
        parts = load_parts(config, ONE_DEVICE)
        sampler = make_sampler(config, parts, steps=4, eta=1.0)

        def score(params, control, t=sampler.ts[1]):
            return control(params, t, x, prompt)

        shapes = re.findall(r"f32\[([\d,]+)\] = exp ", str(jax.make_jaxpr(score)(parts.params, sampler.control)))
        assert max(int(shape.split(",")[-2]) for shape in shapes if shape.endswith(",64")) == rows
        found.append(jax.jit(score)(parts.params, sampler.control))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "device, precision, chunk, name",
    [
        (dict(platform="cpu"), "bfloat16", None, "by-head"),
        (dict(platform="tpu"), "bfloat16", None, "xla"),
        (dict(platform="gpu", version="cuda 12090", compute_capability="9.0"), "bfloat16", None, "cudnn"),
        (dict(platform="gpu", version="cuda 12090", compute_capability="9.0"), "float32", None, "xla"),
        (dict(platform="gpu", version="cuda 12090", compute_capability="9.0"), "bfloat16", 256, "xla"),
        (dict(platform="gpu", version="cuda 12090", compute_capability="7.5"), "bfloat16", None, "xla"),
        (dict(platform="gpu", version="rocm 60300", compute_capability="gfx90a"), "bfloat16", None, "xla"),
    ],
)
def test_attention_suits_the_device(device, precision, chunk, name):
    about = dict(device)
    client = types.SimpleNamespace(platform_version=about.pop("version", ""))
    assert suited_attention(precision, chunk, types.SimpleNamespace(client=client, **about)) == name
    assert make_attention("cudnn", precision) is sd.flash_attention
    assert make_attention("xla", precision) is jax.nn.dot_product_attention


def test_prompts_are_drawn_in_groups():
    law = sd.drawn_prompts(7, 3)
    drawn = np.asarray(law(jax.random.key(0), 12)).reshape(4, 3)
    assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0])) == 4 and drawn.max() < 7
    many = np.asarray(sd.drawn_prompts(2, 1)(jax.random.key(0), 400))
    assert abs(many.mean() - 0.5) < 0.1
    with pytest.raises(ValueError, match="per_prompt=3 must divide"):
        law(jax.random.key(0), 10)
    heavy = np.asarray(sd.drawn_prompts(3, 1, [1, 0, 3])(jax.random.key(0), 4000))
    assert set(heavy.tolist()) == {0, 2} and abs((heavy == 2).mean() - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    even = sd.drawn_prompts(7, 3, [4] * 7)(jax.random.key(0), 12)
    np.testing.assert_array_equal(even, drawn.ravel())  # as without weights


def test_diversity_within_prompts():
    images = np.zeros((4, 32, 32, 3))
    images[1] += 0.5
    images[2] += 9.0  # of another prompt
    images[3] += 9.0
    assert np.isclose(prompt_diversity(images, np.asarray([0, 0, 1, 1])), 0.25)
    assert prompt_diversity(images, np.arange(4)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reward=("nice",)), "'nice' is not one of jpeg_compressibility"),
        (dict(algorithm="dpo"), "algorithm='dpo' is not one of score_as_action"),
        (dict(reward=("brightness",), reward_weights=(1.0, 2.0)), "one for each of reward"),
        (dict(reward=("a:b",), kl_weight=None), "has no default"),
        (dict(batch=6, samples_per_prompt=4), "must be a multiple of samples_per_prompt=4"),
        (dict(eta=0.0), "eta=0.0 must be positive"),
        (dict(evaluation_solvers=("Tsit7",)), "'Tsit7' is not one of"),
        (dict(held_out_prompts=Path("none.txt")), "none.txt is not a file"),
        (dict(reward=("aesthetic",)), "needs its files in rewards"),
        (dict(reward=("jpeg_compressibility",), algorithm="draft"), "is a black box"),
        (dict(algorithm="log_variance", kl_weight=0.1, samples_per_prompt=1), "at least 2 for log_variance"),
        (dict(attention_chunk=0), "attention_chunk=0 must be at least 1"),
        (dict(size=44), "must be a multiple of 8 pixels"),
        (dict(reward=("tests.nothing:here",)), "cannot be imported"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tiny, settings, message):
    config = dataclasses.replace(tiny, **settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(config)
        parts = load_parts(config, ONE_DEVICE)
        latent_shape(config, parts.model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_valid(name):
    config = PUBLISHED[name].config
    check(config)
    assert kl_weight_of(config) >= 0 and config.batch % config.rollouts == 0
    per_path = config.steps if config.times is None else config.times
    devices = 16  # of the slice that they are meant for
    assert config.batch * per_path % (config.minibatches * config.accumulation * devices) == 0
    assert config.batch % (config.rollouts * devices) == 0
    assert PUBLISHED[name].link.startswith("https://arxiv.org/abs/")
