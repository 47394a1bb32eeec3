"""LoRA from and to the files of diffusers and peft."""

import copy
import importlib
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from ctrl_diffusion.stable_diffusion import UNet, add_lora, load_lora, load_network, lora_parameters, save_lora
from tests.lora_reference import (
    ALPHA,
    ATTENTION,
    CONFIG,
    DIFFUSERS,
    INPUTS,
    PEFT,
    RANK,
    TARGETS,
    changed,
    leaves,
    randomised,
)
from tests.stable_diffusion_reference import GATE, call, diffusers, relative, rewrite, saved, torch, unet

peft = pytest.importorskip("peft", reason="parity with peft: pip install 'ctrl-diffusion[torch]'")
peft_utils = importlib.import_module("peft.utils")
diffusers_utils = importlib.import_module("diffusers.utils")


@pytest.fixture(scope="module")
def model():
    return unet("SD 1")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """A network without LoRA, for tests that must not change it."""
    return load_network(UNet, saved(model, tmp_path_factory.mktemp("unet")))


@pytest.fixture
def network(plain):
    return changed(plain)


@pytest.fixture(scope="module")
def output(plain):
    """Of the network of the same name."""
    return changed(plain)(*INPUTS)


# --- what we write


@pytest.mark.slow
def test_diffusers_reads_what_we_write(network, model, output, tmp_path):
    save_lora(network, tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [DIFFUSERS]
    other = copy.deepcopy(model)
    other.load_lora_adapter(tmp_path / "lora", prefix="unet", use_safetensors=True)
    assert relative(call(other, *INPUTS), output) < GATE


def test_peft_reads_what_we_write(network, model, output, tmp_path):
    save_lora(network, tmp_path / "lora", format="peft")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()
    assert relative(call(other, *INPUTS), output) < GATE
    config = other.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 6)
    assert set(config.rank_pattern.values()) == {3} and set(config.alpha_pattern.values()) == {1.5}
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 6  # transformers


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_we_read_what_we_write(plain, network, output, tmp_path, format):
    """Into a UNet without LoRA and into one that has it; peft's files bring back the parameters themselves."""
    save_lora(network, tmp_path, format)
    fresh = nnx.clone(plain)
    load_lora(fresh, tmp_path)
    assert relative(fresh(*INPUTS), output) < GATE
    if format == "peft":
        assert_same(fresh, network)
    load_lora(network, tmp_path)
    assert_same(network, fresh)


def test_parameters_come_back_from_diffusers_files_if_alpha_is_the_rank(plain, tmp_path):
    network, fresh = nnx.clone(plain), nnx.clone(plain)
    add_lora(network, RANK, rngs=nnx.Rngs(0))
    save_lora(randomised(network), tmp_path)
    load_lora(fresh, tmp_path)
    assert_same(fresh, network)


def assert_same(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    first, second = leaves(lora_parameters(a)), leaves(lora_parameters(b))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_writing_is_whole_or_not_at_all(network, tmp_path, monkeypatch):
    """A failure leaves what was there, and a folder with anything else in it is left alone."""
    folder = tmp_path / "lora"
    save_lora(network, folder)
    save_lora(network, folder, format="peft")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, PEFT]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("ctrl_diffusion.stable_diffusion.lora_files.save_file", lambda *_: 1 / 0)
        save_lora(network, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    (folder / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="lora holds README.md, which would be lost: LoRA is written into a folder of its own"):
        save_lora(network, folder)
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="format='kohya' must be one of 'diffusers', 'peft'"):
        save_lora(network, folder, format="kohya")


# --- what we read


def adapted(model, **changes):
    """A torch UNet with peft's LoRA, every parameter of it moved."""
    model = copy.deepcopy(model)
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(ATTENTION))
    model.add_adapter(peft.LoraConfig(**(options | changes)))
    return moved(model)


def moved(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model.eval()


def by_adapter(model, folder):
    model.save_lora_adapter(folder)


def by_pipeline(model, folder):
    """As diffusers' training scripts do, with alpha in the metadata."""
    layers = diffusers_utils.convert_state_dict_to_diffusers(peft_utils.get_peft_model_state_dict(model))
    metadata = model.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata)


def by_pipeline_without_alpha(model, folder):
    layers = diffusers_utils.convert_state_dict_to_diffusers(peft_utils.get_peft_model_state_dict(model))
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, layers)


def in_old_names(model, folder):
    """Of diffusers before 0.22."""
    by_pipeline_without_alpha(model, folder)
    pattern = r"\.(to_q|to_k|to_v|to_out)(?:\.0)?\.lora\."
    rewrite(
        folder / DIFFUSERS,
        lambda tensors: {re.sub(pattern, r".processor.\1_lora.", name): tensor for name, tensor in tensors.items()},
    )


def in_half_precision(model, folder):
    by_pipeline_without_alpha(model, folder)
    rewrite(folder / DIFFUSERS, lambda tensors: {name: tensor.astype(np.float16) for name, tensor in tensors.items()})


PATTERNS = dict(rank_pattern={"attn1.to_q": 2}, alpha_pattern={r"attn\d.to_k": 3})
EVERYWHERE = PATTERNS | dict(alpha_pattern={r"attn\d.to_k": 3, "proj_in": 1}, target_modules=list(TARGETS))


@pytest.mark.parametrize(
    ("write", "prefix", "changes"),
    [
        (by_adapter, None, EVERYWHERE),
        (by_pipeline, "unet", PATTERNS | dict(use_rslora=True)),
        (by_pipeline_without_alpha, "unet", PATTERNS),
        (in_old_names, "unet", {}),
        (in_half_precision, "unet", {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_we_read_what_diffusers_writes(model, plain, tmp_path, write, prefix, changes):
    """And understand it as diffusers does."""
    write(adapted(model, **changes), tmp_path)
    other = copy.deepcopy(model)
    other.load_lora_adapter(tmp_path, prefix=prefix, use_safetensors=True)
    network = nnx.clone(plain)
    load_lora(network, tmp_path)
    assert relative(call(other, *INPUTS), call(model, *INPUTS)) > 0.1
    assert relative(network(*INPUTS), call(other, *INPUTS)) < GATE


@pytest.mark.slow
def test_we_read_both_spellings_in_one_file(model, plain, tmp_path):
    """diffusers' own scripts write such files for layers outside of attention, of which it then ignores one half."""
    other = adapted(model, lora_alpha=RANK, target_modules=list(TARGETS))
    by_pipeline_without_alpha(other, tmp_path)
    with safe_open(tmp_path / DIFFUSERS, "numpy") as file:
        assert {name for names in file.keys() for name in re.findall(r"lora_A|lora\.down", names)} == {"lora_A", "lora.down"}
    network = nnx.clone(plain)
    load_lora(network, tmp_path)
    assert relative(network(*INPUTS), call(other, *INPUTS)) < GATE


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [EVERYWHERE, dict(use_rslora=True, target_modules=r".*attn2\.to_(q|k)")], ids=["patterns", "rslora"]
)
def test_we_read_what_peft_writes(model, plain, tmp_path, changes):
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    other = moved(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(options | changes))))
    other.save_pretrained(tmp_path)
    network = nnx.clone(plain)
    load_lora(network, tmp_path)
    assert relative(network(*INPUTS), call(other, *INPUTS)) < GATE


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP = f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"  # [4, 24] and [64, 4]


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def with_tensor(name, change):
    return lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors.get(name)))}


FILES = {
    "missing up": (lambda t: {n: v for n, v in t.items() if n != UP}, f"'{DOWN}' has no counterpart: '{UP[5:]}' is missing"),
    "missing down": (
        lambda t: {n: v for n, v in t.items() if n != DOWN},
        f"'{UP}' has no counterpart: '{DOWN[5:]}' is missing",
    ),
    "twice": (
        lambda t: t | {f"{LAYER}.lora_A.weight": t[DOWN]},
        r"lora_A.weight' is also in .* as|lora.down.weight' is also in .* as",
    ),
    "text encoder": (
        with_tensor("text_encoder.q_proj.lora_A.weight", lambda _: np.ones(2)),
        "tensor 'text_encoder.*' has no counterpart",
    ),
    "bias": (with_tensor(f"{LAYER}.bias", lambda _: np.ones(1)), f"'{LAYER}.bias' is not part of a UNet's LoRA"),
    "no such layer": (
        renamed("mid_block", "middle"),
        "for middle.attentions.0.*, no dense layer or 1x1 convolution of the UNet",
    ),
    "transposed down": (
        with_tensor(DOWN, np.transpose),
        r"'.*down.weight' is \[24, 4\], but the UNet's layer needs \['rank', 24\]",
    ),
    "transposed up": (
        with_tensor(UP, np.transpose),
        r"'.*up.weight' is \[4, 64\], but the UNet's layer and rank 4 need \[64, 4\]",
    ),
    "convolution": (with_tensor(DOWN, lambda down: down[..., None, None]), r"is \[4, 24, 1, 1\], but the UNet's layer needs"),
    "type": (with_tensor(DOWN, lambda down: down.astype(np.float64)), "is of type F64, which is none of F16, BF16, F32"),
    "empty": (lambda tensors: {}, "has no tensors"),
}


@pytest.fixture(scope="module")
def written(plain, tmp_path_factory):
    """LoRA of the cross-attention in both formats."""
    network, folders = nnx.clone(plain), {}
    add_lora(network, RANK, targets=["attn2.to_k"], rngs=nnx.Rngs(0))
    for format in ("diffusers", "peft"):
        folders[format] = tmp_path_factory.mktemp(format) / "lora"
        save_lora(network, folders[format], format)
    return folders


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(plain, written, tmp_path, case):
    """By file and tensor, with nothing changed."""
    change, message = FILES[case]
    (tmp_path / DIFFUSERS).write_bytes((written["diffusers"] / DIFFUSERS).read_bytes())
    rewrite(tmp_path / DIFFUSERS, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / DIFFUSERS))}.*{message}"):
        load_lora(plain, tmp_path)
    assert not jax.tree.leaves(lora_parameters(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(r=8), r"to_k.lora_A.weight' is \[4, 24\], but .*adapter_config.json says rank 8"),
        (dict(lora_alpha=None), "lora_alpha=None must be a number"),
        (dict(peft_type="LOHA"), "peft_type='LOHA' is not read"),
        (dict(use_dora=True), "use_dora=True is not read"),
        (dict(bias="all"), "bias='all' is not read"),
        (dict(layers_to_transform=0), "layers_to_transform=0 is not read"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the UNet's own weights"),
        (
            dict(target_modules=["attn2.to_k", "attn2.to_v"]),
            r"tensors of \S+to_v are missing, which .*adapter_config.json targets",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_descriptions_that_are_refused(plain, written, tmp_path, change, message):
    (tmp_path / PEFT).write_bytes((written["peft"] / PEFT).read_bytes())
    config = json.loads((written["peft"] / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_lora(plain, tmp_path)
    assert not jax.tree.leaves(lora_parameters(plain))


def test_folders_that_are_refused(plain, network, written, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds neither: it needs {DIFFUSERS} or {PEFT}"):
        load_lora(plain, tmp_path)
    (tmp_path / PEFT).write_bytes((written["peft"] / PEFT).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing: it has alpha"):
        load_lora(plain, tmp_path)
    (tmp_path / DIFFUSERS).write_bytes((written["diffusers"] / DIFFUSERS).read_bytes())
    with pytest.raises(FileNotFoundError, match="holds both"):
        load_lora(plain, tmp_path)
    with pytest.raises(ValueError, match=r"has other layers than the network's LoRA .*: merge_lora\(network\) first"):
        load_lora(network, written["diffusers"])
