"""Whole generations with classifier-free guidance, from prompts to images, against diffusers' pipeline."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.solvers import DDIM, ExponentialEuler, integrate
from ctrl_diffusion.stable_diffusion import add_lora, load_folder, parse_noising, save_lora
from tests.lora_reference import randomised
from tests.stable_diffusion_reference import (
    EXTRA,
    GATE,
    SCHEDULER,
    compiled,
    diffusers,
    nchw,
    nhwc,
    normal,
    pipeline,
    relative,
    torch,
)

STEPS, GUIDANCE = 10, 7.5
PROMPTS = ["a cat", "the cats sat"]
SCHEDULERS = {
    "SD 1": {},
    "to zero noise": dict(set_alpha_to_one=True, steps_offset=0),
    "v-prediction": dict(prediction_type="v_prediction"),
    "trailing": dict(timestep_spacing="trailing"),
    "cosine table": dict(beta_schedule="squaredcos_cap_v2"),
}


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return pipe, load_folder(folder / "model")


def guided(network, noising, process):
    """The score of classifier-free guidance, as a control; `cond` is a pair of contexts `[b, n, e]`."""
    graphdef, params = nnx.split(network)

    def control(params, t, x, cond):
        tau = process.tau(t)
        timesteps = jnp.broadcast_to(noising.timestep(tau), (2 * x.shape[0],))
        both = nnx.merge(graphdef, params)(jnp.concatenate([x, x]), timesteps, jnp.concatenate(cond))
        empty, text = jnp.split(both, 2)
        return noising.prediction.to_score(process.schedule, tau, x, empty + GUIDANCE * (text - empty))

    return control, params


def generator(network, noising, solver):
    """`generate(start [b, h, w, c], (context without text, context)) -> latents` with guidance, deterministic."""
    process = noising.process(STEPS, eta=0.0)
    control, params = guided(network, noising, process)

    @compiled
    def run(x, args):
        return integrate(process.term(control, None), solver, noising.grid(STEPS), x, args)

    return lambda start, contexts: run(jnp.asarray(start), (params, contexts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, ExponentialEuler()) for name in SCHEDULERS] + [("SD 1", DDIM())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_generation(today, name, solver):
    pipe, model = today
    config = SCHEDULER | SCHEDULERS[name]
    pipe.scheduler = diffusers.DDIMScheduler(**config)
    noising = parse_noising({"_class_name": "DDIMScheduler", **config})
    start = normal(5, 2, 8, 8, 4)
    options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
    expected = nhwc(pipe(PROMPTS, latents=nchw(start), **options).images)
    np.testing.assert_array_equal(pipe.scheduler.timesteps, noising.timesteps(STEPS))

    generate = generator(model.unet, noising, solver)
    empty, text = model.encode(["", ""]), model.encode(PROMPTS)
    latents = generate(start, (empty, text))
    assert relative(latents, expected) < GATE
    if name == "SD 1" and isinstance(solver, DDIM):
        unguided = generate(start, (text, text))
        assert relative(unguided, expected) > 0.1  # the texts matter
        with torch.no_grad():
            images = nhwc(pipe.vae.decode(nchw(expected) / pipe.vae.config.scaling_factor).sample)
        assert relative(model.vae.to_images(latents), images) < GATE


@pytest.mark.slow
def test_images_of_exported_lora(today, tmp_path):
    """diffusers' pipeline loads what we write, and makes our images."""
    pytest.importorskip("peft", reason=EXTRA)
    network, model = nnx.clone(today[1].unet), today[1]
    add_lora(network, 4, alpha=6.0, rngs=nnx.Rngs(0))
    save_lora(randomised(network), tmp_path / "lora")
    pipe, noising = pipeline(tmp_path), parse_noising({"_class_name": "DDIMScheduler", **SCHEDULER})
    pipe.set_progress_bar_config(disable=True)
    start = normal(5, 2, 8, 8, 4)

    def images():
        options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np")
        return pipe(PROMPTS, latents=nchw(start), **options).images

    before = images()
    pipe.load_lora_weights(tmp_path / "lora")
    expected = images()
    assert relative(before, expected) > 0.1  # it matters
    latents = generator(network, noising, ExponentialEuler())(start, (model.encode(["", ""]), model.encode(PROMPTS)))
    got = jnp.clip(0.5 + 0.5 * model.vae.to_images(latents), 0, 1)
    assert relative(got, expected) < GATE
