"""Descriptions of networks and noise: what is read from files, and what is refused; no torch needed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.predictions import EPSILON, X0, V
from ctrl_diffusion.stable_diffusion import (
    VAE,
    CLIPText,
    CLIPTextConfig,
    Noising,
    UNet,
    UNetConfig,
    VAEConfig,
    abstract_network,
    parse_config,
    parse_noising,
    read_config,
    read_noising,
)
from ctrl_diffusion.stable_diffusion.noising import OTHER_SAMPLERS, noising_values

SD15_UNET = """{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
  "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"""


def test_the_unet_of_stable_diffusion_15():
    assert parse_config(UNetConfig, json.loads(SD15_UNET)) == UNetConfig()
    assert UNetConfig().heads == (8, 8, 8, 8)  # heads of width 40, 80, 160, 160


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls, config, parameters, tensors",
    [
        (UNet, UNetConfig(), 859_520_964, 686),
        (VAE, VAEConfig(), 83_653_863, 248),
        (CLIPText, CLIPTextConfig(), 123_060_480, 196),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_sizes_of_stable_diffusion_15(cls, config, parameters, tensors):
    leaves = jax.tree.leaves(nnx.state(abstract_network(lambda rngs: cls(config, rngs=rngs))))
    assert len(leaves) == tensors and sum(leaf.size for leaf in leaves) == parameters


def test_absent_entries_mean_what_they_mean_to_diffusers():
    assert parse_config(UNetConfig, {}).cross_attention_dim == 1280
    assert parse_config(VAEConfig, {}).block_out_channels == (64,)
    assert parse_config(VAEConfig, {}).scaling_factor == 0.18215
    assert parse_config(CLIPTextConfig, {}).hidden_size == 512


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (UNetConfig, {"act_fn": "gelu"}, "act_fn='gelu' is not supported: it must be 'silu' or 'swish'"),
        (UNetConfig, {"only_cross_attention": True}, "only_cross_attention=True is not supported: it must be False"),
        (
            UNetConfig,
            {"class_embed_type": "timestep"},
            "class_embed_type='timestep' is not supported: this library does not know",
        ),
        (UNetConfig, {"num_attention_heads": 8}, "num_attention_heads=8 is not supported: it must be None"),
        (UNetConfig, {"layers_per_block": [1, 2]}, r"layers_per_block=\(1, 2\) is not supported: it must be int"),
        (UNetConfig, {"flip_sin_to_cos": 1}, "flip_sin_to_cos=1 is not supported: it must be bool"),
        (UNetConfig, {"norm_num_groups": None}, "norm_num_groups=None is not supported: it must be int"),
        (UNetConfig, {"norm_num_groups": 0}, "norm_num_groups=0 must be at least 1"),
        (UNetConfig, {"attention_head_dim": [8, 0, 8, 8]}, r"attention_head_dim=\(8, 0, 8, 8\) must be at least 1"),
        (CLIPTextConfig, {"num_attention_heads": -1}, "num_attention_heads=-1 must be at least 1"),
        (UNetConfig, {"norm_num_groups": 48}, "norm_num_groups=48 must divide block_out_channels=320"),
        (UNetConfig, {"attention_head_dim": 7}, r"attention_head_dim=7 \(the number of heads\) must divide"),
        (UNetConfig, {"attention_head_dim": [5, 10]}, r"attention_head_dim=\(5, 10\) must have one entry per entry of"),
        (UNetConfig, {"down_block_types": ["DownBlock2D"]}, "down_block_types=.* must have one entry per entry of block_out"),
        (
            UNetConfig,
            {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 4},
            "up_block_types has 'SimpleCrossAttnUpBlock2D', which is not supported: it must be 'CrossAttnUpBlock2D' or 'UpBlock2D'",
        ),
        (UNetConfig, {"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel' is not supported"),
        (VAEConfig, {"mid_block_add_attention": False}, "mid_block_add_attention=False is not supported: it must be True"),
        (VAEConfig, {"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
        (VAEConfig, {"sample_size": [64, 64]}, "sample_size=.* is not supported: it must be int"),
        (
            CLIPTextConfig,
            {"hidden_act": "relu"},
            "hidden_act has 'relu', which is not supported: it must be 'gelu' or 'quick_gelu'",
        ),
        (CLIPTextConfig, {"num_attention_heads": 7}, "num_attention_heads=7 must divide hidden_size=512"),
        (CLIPTextConfig, {"architectures": ["CLIPModel"]}, r"architectures=\('CLIPModel',\) is not supported"),
    ],
)
def test_refused_descriptions(cls, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_config(cls, values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_config(cls, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "it must hold a JSON object"),
        ('{"layers_per_block": 2, "layers_per_block": 1}', "layers_per_block is there twice, as 2 and as 1: leave one"),
        ('{"norm_eps": NaN}', "norm_eps=nan is not supported: it must be a finite float"),
    ],
)
def test_no_json_object(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_config(UNetConfig, tmp_path / "config.json")


def test_files_as_people_have_them(tmp_path):
    """With a byte-order mark, an entry repeated with its own value, and what diffusers adds to an average of parameters."""
    ema = dict(
        decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=5, power=0.7, update_after_step=0, use_ema_warmup=True
    )
    text = json.dumps(json.loads(SD15_UNET) | ema)
    (tmp_path / "config.json").write_text(text[:-1] + ', "layers_per_block": 2}', encoding="utf-8-sig")
    assert read_config(UNetConfig, tmp_path / "config.json") == UNetConfig()


# --- noise

SD15_NOISE = json.loads("""{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false,
  "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null, "clip_sample": false}""")


def test_the_noise_of_stable_diffusion_15(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD15_NOISE))
    noising = read_noising(tmp_path / "scheduler_config.json")
    assert noising == Noising() and noising.prediction is EPSILON
    np.testing.assert_allclose(noising.betas, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_array_equal(noising.timesteps(50), np.arange(981, 0, -20))
    np.testing.assert_allclose(1 - noising.grid(50), np.append(np.arange(982, 0, -20), 1) / 1000)


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_data", [False, True])
def test_grids_fit_their_processes(steps, spacing, to_data):
    noising = Noising(timestep_spacing=spacing, set_alpha_to_one=to_data)
    process = noising.process(steps, eta=0.5)
    grid = process.check_grid(noising.grid(steps))
    assert len(grid) == steps + (spacing != "linspace" or to_data) and process.eta == 0.5
    taus = process.tau(jnp.asarray(grid[:-1], jnp.float32))
    np.testing.assert_array_equal(noising.timestep(taus), noising.timesteps(steps))  # exactly, in float32


def test_a_step_that_ends_where_it_starts_is_left_out():
    assert list(Noising(steps_offset=0).timesteps(4)) == [750, 500, 250]
    assert list(Noising(steps_offset=0, set_alpha_to_one=True).timesteps(4)) == [750, 500, 250, 0]
    with pytest.raises(ValueError, match="steps=1: the only timestep is 0, where sampling ends"):
        Noising(steps_offset=0).timesteps(1)


def test_betas():
    linear = Noising(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=4).betas
    np.testing.assert_allclose(linear, [0.0001, 0.0067333333, 0.0133666667, 0.02], rtol=1e-6)
    noising = Noising(beta_schedule="squaredcos_cap_v2")
    products = np.cumprod(1 - noising.betas)
    u = np.arange(1, 1000) / 1000
    np.testing.assert_allclose(
        products[:-1], (np.cos((u + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    )
    assert noising.betas[-1] == 0.999
    assert Noising(prediction_type="v_prediction").prediction is V and Noising(prediction_type="sample").prediction is X0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name has 'EDMEulerScheduler', which is not supported"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True is not supported"),
        ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not"),
        ({"beta_start": -0.00085}, "beta_start=-0.00085 must be between 0 and 1"),
        ({"beta_end": 1.0}, "beta_end=1.0 must be between 0 and 1"),
        ({"beta_end": float("inf")}, "beta_end=inf is not supported: it must be a finite float"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be at least 2"),
        ({"steps_offset": -1}, "steps_offset=-1 must be at least 0"),
        ({"_class_name": None}, "_class_name has 'None', which is not supported: it must be 'DDIMScheduler' or"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule has 'sigmoid', which is not supported"),
        ({"prediction_type": "flow"}, "prediction_type has 'flow', which is not supported"),
        ({"timestep_spacing": "log"}, "timestep_spacing has 'log', which is not supported"),
        ({"trained_betas": [0.1]}, "trained_betas=.* is not supported: it must be None"),
        ({"clip_sample": True}, "clip_sample=True is not supported: it must be False"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not supported: it must be False"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps=1000.0 is not supported: it must be int"),
    ],
)
def test_refused_noise(values, message):
    with pytest.raises(ValueError, match=message):
        parse_noising(SD15_NOISE | values)


def test_absent_entries_depend_on_the_class():
    assert parse_noising({"_class_name": "DDIMScheduler", "clip_sample": False}).set_alpha_to_one
    assert not parse_noising({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    with pytest.raises(ValueError, match="clip_sample=True is not supported"):
        parse_noising({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize("name", OTHER_SAMPLERS)
def test_the_noise_of_other_samplers(name, tmp_path):
    """What diffusers itself makes of the folder of Stable Diffusion 1.5, and of a file with nothing in it but a name."""
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install 'ctrl-diffusion[torch]'")
    cls = getattr(diffusers, name)
    for values in (SD15_NOISE, {}):
        scheduler = cls.from_config({key: v for key, v in values.items() if key != "_class_name"})
        scheduler.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=f"scheduler_config.json: {name} is a sampler. Its noise is taken"):
            noising = read_noising(tmp_path / "scheduler_config.json")
        np.testing.assert_allclose(noising.betas, scheduler.betas.numpy(), rtol=1e-6)
        spacing = getattr(scheduler.config, "timestep_spacing", "linspace")
        assert (noising.timestep_spacing, noising.steps_offset) == (spacing, scheduler.config.get("steps_offset", 0))
        assert noising.set_alpha_to_one == (name != "LCMScheduler" or not values)  # as in SD15_NOISE
    absent = parse_noising({"_class_name": name})
    assert absent == noising  # what diffusers leaves out means the same here
    assert parse_noising(noising_values(absent)) == absent


def test_the_end_that_a_sampler_names():
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min", "lambda_min_clipped": -float("inf")}
    assert not parse_noising(SD15_NOISE | dpm).set_alpha_to_one
    assert parse_noising(SD15_NOISE | dpm | {"final_sigmas_type": "zero"}).set_alpha_to_one
