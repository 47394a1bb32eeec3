"""LoRA as kohya's scripts and ComfyUI write it, against our own and diffusers' reading; LoRA and descriptions that are refused."""

import copy
import importlib
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ctrl_diffusion.stable_diffusion import UNet, add_lora, load_lora, load_network, lora_parameters, save_lora
from ctrl_diffusion.stable_diffusion.kohya import original
from ctrl_diffusion.stable_diffusion.lora import lora_layers, pointwise_layers
from tests.lora_reference import CONFIG, DIFFUSERS, INPUTS, PEFT, changed, randomised
from tests.stable_diffusion_reference import GATE, call, diffusers, relative, saved, torch, unet

conversion = importlib.import_module("diffusers.loaders.lora_conversion_utils")


@pytest.fixture(scope="module")
def model():
    return unet("SD 1")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return load_network(UNet, saved(model, tmp_path_factory.mktemp("unet")))


@pytest.fixture(scope="module")
def network(plain):
    return changed(plain)


def kohya(network, name):
    """The file's tensors; `name(layer)` is a layer's prefix."""
    tensors = {}
    for layer, (_, lora) in lora_layers(network).items():
        pixel = (1,) * (lora.layer.kernel.ndim - 2)
        for kind, array in (("lora_down", lora.down[...]), ("lora_up", lora.up[...])):
            tensors[f"{name(layer)}.{kind}.weight"] = np.ascontiguousarray(np.asarray(array).T).reshape(
                array.shape[::-1] + pixel
            )
        tensors[f"{name(layer)}.alpha"] = np.asarray(lora.alpha, np.float32)
    return tensors


def underscored(layer):
    return f"lora_unet_{layer.replace('.', '_')}"


NAMES = {
    "kohya": underscored,
    "kohya, original names": lambda layer: underscored(original(layer, 2)),
    "ComfyUI": lambda layer: f"diffusion_model.{original(layer, 2)}",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_lora(plain, network, tmp_path, name):
    """Layers, ranks, alphas and numbers, from a file of any name."""
    save_file(kohya(network, NAMES[name]), tmp_path / "style v2.safetensors")
    fresh = nnx.clone(plain)
    load_lora(fresh, tmp_path / "style v2.safetensors")
    assert nnx.graphdef(fresh) == nnx.graphdef(network)
    for a, b in zip(jax.tree.leaves(lora_parameters(fresh)), jax.tree.leaves(lora_parameters(network)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_diffusers_reads_the_same_of_it(plain, model, tmp_path):
    """Attention, with alphas that are not the ranks."""
    network = nnx.clone(plain)
    add_lora(network, 4, alpha=1.5, rngs=nnx.Rngs(0))
    tensors = kohya(randomised(network), underscored)
    save_file(tensors, tmp_path / "style.safetensors")
    fresh = nnx.clone(plain)
    load_lora(fresh, tmp_path / "style.safetensors")
    mixin, theirs = diffusers.loaders.StableDiffusionLoraLoaderMixin, copy.deepcopy(model)
    found, alphas = mixin.lora_state_dict({key: torch.from_numpy(np.array(v)) for key, v in tensors.items()})
    mixin.load_lora_into_unet(found, network_alphas=alphas, unet=theirs)
    assert relative(fresh(*INPUTS), call(theirs, *INPUTS)) < GATE


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_original_names_are_those_that_diffusers_knows(layers_per_block):
    """Of attention and ResNet blocks, by diffusers' own way back."""
    model = unet("SD 2" if layers_per_block == 1 else "SD 1")
    blocks = [name for name, _ in model.named_modules() if ".resnets." in name or ".attentions." in name]
    blocks = [name for name in blocks if name.split(".")[-1].isdigit() and name.split(".")[-2] in ("resnets", "attentions")]
    assert len(blocks) > 10
    renamed = {f"lora_unet_{original(f'{name}.x', layers_per_block)}".replace(".", "_"): name for name in blocks}
    back = conversion._maybe_map_sgm_blocks_to_diffusers(dict(renamed), model.config)
    theirs = {"down_blocks": "input_blocks", "mid_block": "middle_block", "up_blocks": "output_blocks"}  # renamed later on

    def as_theirs(name):
        side, rest = name.split(".", 1)
        return underscored(f"{theirs[side]}.{rest}.x")

    assert back == {as_theirs(name): name for name in blocks}


def test_layers_outside_of_blocks(plain):
    assert original("time_embedding.linear_2", 2) == "time_embed.2"
    assert original("down_blocks.0.resnets.0.conv_shortcut", 2) == "input_blocks.1.0.skip_connection"
    assert original("up_blocks.1.resnets.2.time_emb_proj", 2) == "output_blocks.5.0.emb_layers.1"
    names = [original(name, 2) for name in pointwise_layers(plain)]
    assert len(set(names)) == len(names)


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
REFUSED = {
    "text encoder": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.ones((2, 2), np.float32)},
        "the text enc",
    ),
    "no such layer": (
        {"lora_unet_nothing.lora_up.weight": np.ones((2, 2), np.float32)},
        "is for lora_unet_nothing, no dense layer",
    ),
    "another method": ({f"{LAYER}.hada_w1_a": np.ones((2, 2), np.float32)}, "is not part of a UNet's LoRA"),
    "up is zero": ({f"{LAYER}.lora_up.weight": np.zeros((64, 4), np.float32)}, "changes nothing: all its `up` are zero"),
    "not finite": ({f"{LAYER}.lora_down.weight": np.full((4, 24), np.nan, np.float32)}, "holds 96 numbers that are not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(plain, tmp_path, case):
    change, message = REFUSED[case]
    network = nnx.clone(plain)
    add_lora(network, 4, targets=["attn2.to_k"], rngs=nnx.Rngs(0))
    tensors = {key: v for key, v in kohya(randomised(network), underscored).items() if key.startswith(LAYER)}
    save_file(tensors | change, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=f"style.safetensors.*{message}"):
        load_lora(plain, tmp_path / "style.safetensors")
    assert not jax.tree.leaves(lora_parameters(plain))


def test_lora_that_changes_nothing_is_refused(plain, tmp_path):
    network = nnx.clone(plain)
    add_lora(network, 4, rngs=nnx.Rngs(0))
    save_lora(network, tmp_path)
    with pytest.raises(ValueError, match=f"{DIFFUSERS} changes nothing: all its `up` are zero, as before training"):
        load_lora(nnx.clone(plain), tmp_path)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_patterns_that_are_none(plain, network, tmp_path, name):
    save_lora(network, tmp_path, format="peft")
    description = json.loads((tmp_path / CONFIG).read_text())
    description[name] = "attn2.(to_k" if name == "target_modules" else {"attn2.(to_k": 3}
    (tmp_path / CONFIG).write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"{CONFIG}: {name} has 'attn2.\(to_k', which is no regular expression: missing \)"):
        load_lora(nnx.clone(plain), tmp_path)
    assert load_file(tmp_path / PEFT)


def test_a_pickled_file_is_named(plain, tmp_path):
    (tmp_path / "style.pt").write_bytes(b"1")
    with pytest.raises(ValueError, match="style.pt is no safetensors file: convert it first"):
        load_lora(plain, tmp_path / "style.pt")
