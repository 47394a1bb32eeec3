"""Stable Diffusion in miniature, made by diffusers and transformers with every tensor moved at random."""

import importlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

EXTRA = "parity with diffusers: pip install 'ctrl-diffusion[torch]'"
torch = pytest.importorskip("torch", reason=EXTRA)
diffusers = pytest.importorskip("diffusers", reason=EXTRA)
transformers = importlib.import_module("transformers")

GATE = 1e-5  # of max |difference| / std(reference) in float32; torch's own rounding is 2e-6 to 7e-6

UNETS = {
    "SD 1": dict(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
    "SD 2": dict(
        sample_size=8,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        norm_eps=1e-4,
        cross_attention_dim=24,
        attention_head_dim=[2, 4, 8],
        use_linear_projection=True,
        upcast_attention=True,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
}
VAE = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=8,
)
TEXT = dict(
    vocab_size=516,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    bos_token_id=514,
    eos_token_id=515,
)


def perturbed(model, seed=0):
    """The model with every tensor moved: what a network leaves out then shows in its output.

    Weights are kept small, so that the eps of the norms matter.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
    return model.eval()


def unet(name="SD 1", **changes):
    return perturbed(diffusers.UNet2DConditionModel(**(UNETS[name] | changes)), seed=1)


def vae(**changes):
    return perturbed(diffusers.AutoencoderKL(**(VAE | changes)), seed=2)


def text_encoder(**changes):
    return perturbed(transformers.CLIPTextModel(transformers.CLIPTextConfig(**(TEXT | changes))), seed=3)


def tokenizer(folder: Path):
    """A tokenizer of bytes and two merges, in the layout of the original repositories."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = ["c a", "ca t</w>"]
    words = letters + [letter + "</w>" for letter in letters] + ["ca", "cat</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | dict(model_max_length=77, do_lower_case=True, tokenizer_class="CLIPTokenizer"))
    )
    return transformers.CLIPTokenizer.from_pretrained(folder)


SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)


def pipeline(folder: Path):
    """A whole pipeline in which the text matters; `folder` is for the vocabulary of its tokenizer."""
    network = unet()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "attn2.to_v" in name:
                parameter *= 10
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder / "vocabulary"),
        unet=network,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def rewrite(file: Path, change) -> None:
    """Replaces the tensors of a safetensors file by `change(tensors)`."""
    numpy = importlib.import_module("safetensors.numpy")
    numpy.save_file(change(numpy.load_file(file)), file, {"format": "pt"})


def original_layout(folder: Path):
    """Rewrites a folder of today's layout as the original repositories of Stable Diffusion 1 are."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile("|".join(map(re.escape, names)))
    rewrite(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        lambda tensors: {pattern.sub(lambda found: names[found[0]], name): tensor for name, tensor in tensors.items()},
    )
    rewrite(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: (
            {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
            | {"text_model.embeddings.position_ids": np.arange(77)[None]}
        ),
    )
    later = ("addition", "class_emb", "time_emb", "resnet", "upcast", "latents", "use_", "force", "scaling", "mid_block_add")
    for part in ("unet", "vae"):
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        config = {name: value for name, value in config.items() if value is not None and not name.startswith(later)}
        file.write_text(json.dumps(config))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not read")
    shutil.rmtree(folder / "tokenizer")
    tokenizer(folder / "tokenizer")


def compiled(function):
    """`jax.jit` with half the compilation time: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def relative(got, reference) -> float:
    """`max |got - reference| / std(reference)`."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    assert got.shape == reference.shape
    return float(np.max(np.abs(got - reference)) / np.std(reference))


def nhwc(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 2, 3, 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normals in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x):
    """An array for torch."""
    return torch.from_numpy(np.array(x))


def nchw(x):
    """An array `[b, h, w, c]` for torch."""
    return tensor(np.asarray(x).transpose(0, 3, 1, 2))


def call(model, x, *arguments) -> np.ndarray:
    """A torch UNet on arrays `[b, h, w, c]`."""
    with torch.no_grad():
        return nhwc(model(nchw(x), *map(tensor, arguments)).sample)


def saved(model, folder: Path) -> Path:
    """The folder into which a torch model has been written."""
    model.save_pretrained(folder, safe_serialization=True)
    return folder
