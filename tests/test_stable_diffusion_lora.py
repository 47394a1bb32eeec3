"""LoRA of the UNet: its training, and its files against diffusers and peft."""

import copy
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open

from ctrl_diffusion.stable_diffusion import (
    LoRA,
    UNet,
    UNetConfig,
    abstract_network,
    add_lora,
    load_lora,
    load_network,
    lora_parameters,
    merge_lora,
    save_lora,
    save_network,
    split_lora,
)
from tests.stable_diffusion_reference import (
    GATE,
    call,
    compiled,
    diffusers,
    normal,
    pipeline,
    relative,
    rewrite,
    saved,
    torch,
    unet,
)

peft = pytest.importorskip("peft", reason="parity with peft: pip install 'ctrl-diffusion[torch]'")
peft_utils = importlib.import_module("peft.utils")
diffusers_utils = importlib.import_module("diffusers.utils")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# linear layers, 1x1 convolutions, and inputs and outputs of different widths
TARGETS = ("to_q", "to_k", "to_out.0", "proj_in", "net.0.proj", "time_emb_proj", "conv_shortcut")
RANK, ALPHA = 4, 6.0
DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
INPUTS = jnp.asarray(normal(0, 2, 8, 6, 4)), jnp.asarray([1.0, 981.0]), jnp.asarray(normal(1, 2, 7, 24))


@pytest.fixture(scope="module")
def model():
    return unet("SD 1")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("unet"))


@compiled
def apply(network, x, timesteps, context):
    return network(x, timesteps, context)


def randomised(network):
    """Every parameter of LoRA moved, so that all of them matter."""
    for i, (_, parameter) in enumerate(sorted(nnx.to_flat_state(lora_parameters(network)))):
        parameter[...] = jnp.asarray(normal(i, *parameter.shape) * 0.5 * parameter.shape[0] ** -0.5)
    return network


@pytest.fixture
def network(folder):
    """With LoRA that matters, of two ranks and alphas, none of which are the same."""
    network = load_network(UNet, folder)
    add_lora(network, RANK, alpha=ALPHA, targets=TARGETS, rngs=nnx.Rngs(0))
    add_lora(network, 3, alpha=1.5, targets=["attn2.to_v"], rngs=nnx.Rngs(1))
    return randomised(network)


@pytest.fixture(scope="module")
def output(folder):
    """Of the network of the same name."""
    return apply(network.__wrapped__(folder), *INPUTS)


def leaves(state):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


# --- training


def test_nothing_changes_at_first(folder):
    network = load_network(UNet, folder)
    before = apply(network, *INPUTS)
    add_lora(network, RANK, alpha=ALPHA, targets=TARGETS, rngs=nnx.Rngs(0))
    assert np.array_equal(apply(network, *INPUTS), before)
    for name, array in leaves(lora_parameters(network)).items():
        assert array.dtype == jnp.float32
        if name.endswith("up"):
            assert not array.any()
        else:  # uniform in +- inputs^-1/2
            assert 0.8 < float(jnp.max(jnp.abs(array))) * array.shape[0] ** 0.5 <= 1, name


def test_attention_is_the_default():
    """32 layers of attention in Stable Diffusion 1, four products each: 797,184 parameters at rank 4, as peft counts."""

    def make(rngs):
        network = UNet(UNetConfig(), rngs=rngs)
        add_lora(network, 4, rngs=rngs)
        return network

    network = abstract_network(make)
    layers = {path for path, module in nnx.iter_modules(network) if isinstance(module, LoRA)}
    assert {path[-1] for path in layers} == {"to_q", "to_k", "to_v", "to_out"} and len(layers) == 4 * 32
    assert sum(leaf.size for leaf in jax.tree.leaves(lora_parameters(network))) == 797_184


def test_only_lora_is_trained():
    """In bfloat16, with recomputation, inside `jit`: gradients, optimiser state and updates of LoRA alone."""
    config = UNetConfig(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    graphdef, shapes = nnx.split(abstract_network(lambda rngs: UNet(config, dtype=jnp.bfloat16, remat=True, rngs=rngs)))
    network = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(0.1 * normal(leaf.size, *leaf.shape)), shapes))
    base_size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network)))
    add_lora(network, 2, alpha=8, targets=(*ATTENTION, "proj_out"), rngs=nnx.Rngs(1))
    function, lora, base = split_lora(network)
    assert jax.tree.leaves(lora)[0] is jax.tree.leaves(lora_parameters(network))[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == base_size
    optimiser = optax.adam(1e-2)
    state = optimiser.init(lora)
    size = sum(leaf.size for leaf in jax.tree.leaves(lora))
    # 4 transformers of width 16: eight products in attention (two from 24) and a projection
    assert size == 4 * 2 * (6 * 32 + 2 * (24 + 16) + 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * size + 1

    def loss(lora, base):
        return jnp.mean((function(lora, base, *INPUTS) - 1) ** 2)

    @compiled
    def step(lora, state, base):
        value, gradients = jax.value_and_grad(loss)(lora, base)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(lora, updates), state, value, gradients

    values = []
    before = apply(network, *INPUTS)
    for i in range(3):
        new, state, value, gradients = step(lora, state, base)
        values.append(float(value))
        for name, gradient in leaves(gradients).items():
            assert gradient.dtype == jnp.float32
            assert gradient.any() == (i > 0 or name.endswith("up")), name  # at up = 0 nothing depends on down
        lora = new
    assert values[2] < values[1] < values[0]
    assert np.isclose(values[0], np.mean((before - 1) ** 2), rtol=0.01)  # in bfloat16
    nnx.update(network, lora)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(lora_parameters(network)), jax.tree.leaves(lora)))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_types(param_dtype):
    """The change is computed in the type of the layer's output, which it keeps."""
    x = jnp.ones((2, 5), jnp.bfloat16)
    for dtype in (None, jnp.bfloat16):
        layer = nnx.Linear(5, 4, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        lora = LoRA(layer, jnp.ones((5, 2)), jnp.ones((2, 4)), alpha=1.0)
        assert lora(x).dtype == layer(x).dtype
        assert np.allclose(lora(x) - layer(x), 0.5 * 5 * 2, rtol=0.02)


# --- merging


def test_merging(network, folder, output, tmp_path):
    with pytest.raises(ValueError, match=r"network has LoRA: merge_lora\(network\)"):
        save_network(network, tmp_path / "merged")
    assert relative(apply(load_network(UNet, folder), *INPUTS), output) > 0.1
    names = set(leaves(nnx.state(load_network(UNet, folder))))
    merge_lora(network)
    assert set(leaves(nnx.state(network))) == names
    assert relative(apply(network, *INPUTS), output) < GATE
    save_network(network, tmp_path / "merged")
    other = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    assert relative(call(other, *INPUTS), output) < GATE


# --- what we write


def test_diffusers_reads_what_we_write(network, model, output, tmp_path):
    save_lora(network, tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [DIFFUSERS]
    other = copy.deepcopy(model)
    other.load_lora_adapter(tmp_path / "lora", prefix="unet", use_safetensors=True)
    assert relative(call(other, *INPUTS), output) < GATE


def test_the_pipeline_reads_what_we_write(model, folder, tmp_path):
    """With the default targets; its images are those of our UNet."""
    network = load_network(UNet, folder)
    add_lora(network, RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
    save_lora(randomised(network), tmp_path / "lora")
    pipe = pipeline(tmp_path)
    pipe.unet = copy.deepcopy(model)
    pipe.load_lora_weights(tmp_path / "lora")
    assert relative(call(pipe.unet, *INPUTS), apply(network, *INPUTS)) < GATE


def test_peft_reads_what_we_write(network, model, output, tmp_path):
    save_lora(network, tmp_path / "lora", format="peft")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()
    assert relative(call(other, *INPUTS), output) < GATE
    config = other.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 6)
    assert set(config.rank_pattern.values()) == {3} and set(config.alpha_pattern.values()) == {1.5}
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 6  # transformers


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_we_read_what_we_write(network, folder, output, tmp_path, format):
    """Into a UNet without LoRA and into one that has it; peft's files bring back the parameters themselves."""
    save_lora(network, tmp_path, format)
    fresh = load_network(UNet, folder)
    load_lora(fresh, tmp_path)
    assert relative(apply(fresh, *INPUTS), output) < GATE
    before = leaves(lora_parameters(network))
    if format == "peft":
        assert nnx.graphdef(fresh) == nnx.graphdef(network)
        after = leaves(lora_parameters(fresh))
        assert set(after) == set(before) and all(np.array_equal(after[name], before[name]) for name in before)
    load_lora(network, tmp_path)
    assert set(leaves(nnx.state(network))) == set(leaves(nnx.state(fresh)))
    assert relative(apply(network, *INPUTS), output) < GATE


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


PATTERNS = dict(rank_pattern={"attn1.to_q": 2}, alpha_pattern={r"attn\d.to_k": 3, "proj_in": 1})


@pytest.mark.parametrize(
    ("write", "prefix", "changes"),
    [
        (by_adapter, None, PATTERNS | dict(target_modules=list(TARGETS))),
        (by_pipeline, "unet", PATTERNS | dict(use_rslora=True)),
        (by_pipeline_without_alpha, "unet", PATTERNS),
        (in_old_names, "unet", {}),
        (in_half_precision, "unet", {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_we_read_what_diffusers_writes(model, folder, tmp_path, write, prefix, changes):
    """And understand it as diffusers does."""
    write(adapted(model, **changes), tmp_path)
    other = copy.deepcopy(model)
    other.load_lora_adapter(tmp_path, prefix=prefix, use_safetensors=True)
    network = load_network(UNet, folder)
    load_lora(network, tmp_path)
    assert relative(call(other, *INPUTS), call(model, *INPUTS)) > 0.1
    assert relative(apply(network, *INPUTS), call(other, *INPUTS)) < GATE


def test_we_read_both_spellings_in_one_file(model, folder, tmp_path):
    """diffusers' own scripts write such files for layers outside of attention, of which it then ignores one half."""
    other = adapted(model, lora_alpha=RANK, target_modules=list(TARGETS))
    by_pipeline_without_alpha(other, tmp_path)
    with safe_open(tmp_path / DIFFUSERS, "numpy") as file:
        assert {re.search(r"lora_A|lora\.down|$", name)[0] for name in file.keys()} == {"lora_A", "lora.down", ""}
    network = load_network(UNet, folder)
    load_lora(network, tmp_path)
    assert relative(apply(network, *INPUTS), call(other, *INPUTS)) < GATE


@pytest.mark.parametrize(
    "changes", [PATTERNS, dict(use_rslora=True, target_modules=r".*attn2\.to_(q|k)")], ids=["patterns", "rslora"]
)
def test_we_read_what_peft_writes(model, folder, tmp_path, changes):
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    other = moved(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(options | changes))))
    other.save_pretrained(tmp_path)
    network = load_network(UNet, folder)
    load_lora(network, tmp_path)
    assert relative(apply(network, *INPUTS), call(other, *INPUTS)) < GATE


# --- refusals


@pytest.fixture(scope="module")
def plain(folder):
    """A network without LoRA, for tests that must not change it."""
    return load_network(UNet, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(alpha=0), "alpha=0.0 must be positive"),
        (dict(targets="to_q"), r"targets='to_q' must be a sequence of strings: pass \[targets\]"),
        (
            dict(targets=["to_q", "o_k"]),
            "'o_k' ends the name of no .*: take from conv_shortcut, linear_1, linear_2, net.2, .*to_out.0",
        ),
        (dict(targets=["conv1"]), "'conv1' is down_blocks.0.resnets.0.conv1, a convolution of more than one pixel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(plain, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        add_lora(plain, **(dict(rank=2, rngs=nnx.Rngs(0)) | options))
    assert not jax.tree.leaves(lora_parameters(plain))


def test_lora_that_is_missing_or_there_already(plain, network, tmp_path):
    for refused in (merge_lora, split_lora, lambda network: save_lora(network, tmp_path / "lora")):
        with pytest.raises(ValueError, match="network has no LoRA: add_lora"):
            refused(plain)
    with pytest.raises(ValueError, match=r"down_blocks.0.attentions.0.\S+to_q has LoRA already: merge_lora"):
        add_lora(network, 2, targets=["to_q"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="format='kohya' must be one of 'diffusers', 'peft'"):
        save_lora(network, tmp_path / "lora", format="kohya")
    assert not (tmp_path / "lora").exists()


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP = f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"  # [4, 24] and [64, 4]


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def changed(name, change):
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
        changed("text_encoder.q_proj.lora_A.weight", lambda _: np.ones(2)),
        "tensor 'text_encoder.*' has no counterpart",
    ),
    "alpha": (changed(f"{LAYER}.alpha", lambda _: np.ones(1)), f"'{LAYER}.alpha' is not part of a UNet's LoRA"),
    "no such layer": (
        renamed("mid_block", "middle"),
        "for middle.attentions.0.*, no dense layer or 1x1 convolution of the UNet",
    ),
    "transposed down": (
        changed(DOWN, np.transpose),
        r"'.*down.weight' is \[24, 4\], but the UNet's layer needs \['rank', 24\]",
    ),
    "transposed up": (changed(UP, np.transpose), r"'.*up.weight' is \[4, 64\], but the UNet's layer and rank 4 need \[64, 4\]"),
    "convolution": (changed(DOWN, lambda down: down[..., None, None]), r"is \[4, 24, 1, 1\], but the UNet's layer needs"),
    "type": (changed(DOWN, lambda down: down.astype(np.float64)), "is of type F64, which is none of F16, BF16, F32"),
    "empty": (lambda tensors: {}, "has no tensors"),
}


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """LoRA of the cross-attention in both formats."""
    network, folders = load_network(UNet, folder), {}
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
    config = json.loads((written["peft"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
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
