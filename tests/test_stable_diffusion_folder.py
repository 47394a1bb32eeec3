"""Folders of Stable Diffusion: both layouts, what is refused, and what diffusers reads back."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ctrl_diffusion.stable_diffusion import (
    VAE,
    CLIPText,
    StableDiffusion,
    UNet,
    load_folder,
    load_network,
    load_tokenizer,
    save_folder,
    save_network,
    tokenize,
)
from tests.stable_diffusion_reference import (
    GATE,
    call,
    diffusers,
    normal,
    original_layout,
    pipeline,
    relative,
    rewrite,
    saved,
    torch,
    unet,
)

UNET_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    """A pipeline, and the folder that diffusers wrote it to."""
    folder = tmp_path_factory.mktemp("today")
    pipe = pipeline(folder)
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return pipe, folder / "model"


def flat(model: StableDiffusion):
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    return {
        (part, *path): np.asarray(leaf[...])
        for part, network in networks.items()
        for path, leaf in nnx.to_flat_state(nnx.state(network))
    }


def assert_same(a: StableDiffusion, b: StableDiffusion):
    assert (a.noising, a.unet.config, a.vae.config, a.text_encoder.config) == (
        *(b.noising, b.unet.config, b.vae.config, b.text_encoder.config),
    )
    first, second = flat(a), flat(b)
    assert first.keys() == second.keys()
    for path, array in first.items():
        np.testing.assert_array_equal(array, second[path], err_msg=str(path))
    prompts = ["a cat", "", "the cats sat"]
    np.testing.assert_array_equal(tokenize(a.tokenizer, prompts), tokenize(b.tokenizer, prompts))


def assert_equal(got, expected, through=None):
    """The same parameters, `expected` rounded to a type on the way if one is given."""
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(nnx.state(network))) for network in (got, expected)), strict=True):
        np.testing.assert_array_equal(a, b if through is None else b.astype(through).astype(b.dtype))
        assert a.dtype == b.dtype


@pytest.mark.slow
def test_both_layouts_are_the_same_model(today, tmp_path):
    _, folder = today
    shutil.copytree(folder, tmp_path / "original")
    original_layout(tmp_path / "original")
    assert not (tmp_path / "original" / "tokenizer" / "tokenizer.json").exists()
    assert_same(load_folder(folder), load_folder(tmp_path / "original"))


@pytest.mark.slow
def test_what_is_saved_is_what_was_loaded_here_and_in_diffusers(today, tmp_path):
    pipe, folder = today
    model = load_folder(folder)
    save_folder(model, tmp_path / "saved")
    assert_same(load_folder(tmp_path / "saved"), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    with safe_open(tmp_path / "saved" / "text_encoder" / TEXT_FILE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        expected, got = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert {**again.scheduler.config}.items() >= {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}.items()
    assert again.tokenizer("a cat").input_ids == pipe.tokenizer("a cat").input_ids
    x, t, context = jnp.asarray(normal(0, 1, 8, 8, 4)), jnp.asarray([500.0]), jnp.asarray(normal(1, 1, 7, 24))
    assert relative(model.unet(x, t, context), call(again.unet, x, t, context)) < GATE


def test_every_parameter_of_a_folder_is_placed(today):
    seen = {}
    model = load_folder(today[1], sharding=lambda name, shape: seen.update({name: shape}))
    assert seen == {".".join(map(str, path)): array.shape for path, array in flat(model).items()}


def test_saving_replaces_a_folder_as_a_whole(today, tmp_path, monkeypatch):
    network = load_network(UNet, today[1] / "unet")
    save_network(network, tmp_path / "unet")
    (tmp_path / "unet" / "stale.txt").write_text("from an older version")
    monkeypatch.setattr("ctrl_diffusion.pretrained.network_folder.save_parameters", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_network(network, tmp_path / "unet")
    assert (tmp_path / "unet" / "stale.txt").exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    save_network(network, tmp_path / "unet")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == ["config.json", UNET_FILE]

    def replace(source, target, replace=os.replace):
        if os.path.basename(source) == "new":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="disk full"):
        save_network(network, tmp_path / "unet")
    assert len(list((tmp_path / "unet").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_half_precision_network_is_saved_as_such(tmp_path):
    folder = saved(unet(), tmp_path / "single")
    network = load_network(UNet, folder, param_dtype=jnp.bfloat16, cast=True)
    save_network(network, tmp_path / "half")
    assert {array.dtype.name for array in load_file(tmp_path / "half" / UNET_FILE).values()} == {"bfloat16"}
    assert_equal(load_network(UNet, tmp_path / "half", param_dtype=jnp.bfloat16), network)


# --- what is refused


@pytest.fixture
def folder(today, tmp_path):
    """A copy of the UNet's folder."""
    return shutil.copytree(today[1] / "unet", tmp_path / "unet")


NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != NAME}, f"{UNET_FILE}: 1 tensors are missing: '{NAME}'"),
        (
            lambda t: {k: v for k, v in t.items() if "norm" not in k},
            f"{UNET_FILE}: .* tensors are missing: '.*', '.*', .*, \\.\\.\\.",
        ),
        (
            lambda t: t | {"class_embedding.weight": t[NAME]},
            f"{UNET_FILE}: 1 tensors are not part of .*: 'class_embedding.weight'",
        ),
        (lambda t: t | {NAME: t[NAME][:-1]}, rf"{UNET_FILE}: tensor '{NAME}' is \[63, 64\], .* where it is \[64, 64\]"),
        (lambda t: t | {NAME: t[NAME].reshape(64, 64, 1, 1)}, rf"{UNET_FILE}: tensor '{NAME}' is \[64, 64, 1, 1\]"),
        (
            lambda t: t | {NAME: t[NAME].astype(np.int32)},
            f"{UNET_FILE}: tensor '{NAME}' is of type I32, which is none of F64, F32",
        ),
        (lambda t: t | {NAME: t[NAME].astype(np.float16)}, f"'{NAME}' is float16, the parameters are float32: pass cast=True"),
    ],
    ids=["missing", "many missing", "extra", "misshapen", "as a convolution", "integers", "half"],
)
def test_refused_tensors(folder, change, message):
    rewrite(folder / UNET_FILE, change)
    with pytest.raises(ValueError, match=message):
        load_network(UNet, folder)


@pytest.mark.parametrize("kept", [4, 1000, -1])
def test_truncated_files(folder, kept):
    data = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=f"{UNET_FILE} is truncated or not a safetensors file"):
        load_network(UNet, folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name)
def test_other_types_are_cast_on_request(folder, dtype):
    exact = load_network(UNet, folder)
    rewrite(folder / UNET_FILE, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="pass cast=True to convert it"):
        load_network(UNet, folder)
    assert_equal(load_network(UNet, folder, cast=True), exact, dtype)


def test_missing_files(folder, tmp_path):
    (folder / UNET_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(
        FileNotFoundError, match=rf"holds no {UNET_FILE} .* \(diffusion_pytorch_model.fp16.safetensors\) are not read"
    ):
        load_network(UNet, folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json: it is not the folder of a UNet"):
        load_network(UNet, folder)
    with pytest.raises(FileNotFoundError, match="holds no vae/: it is not a folder of Stable Diffusion"):
        load_folder(tmp_path)


def test_a_folder_of_another_network(folder):
    with pytest.raises(
        ValueError, match="config.json: _class_name='UNet2DConditionModel' is not supported: it must be 'Autoen"
    ):
        load_network(VAE, folder)


def test_both_names_of_one_tensor(today, tmp_path):
    folder = shutil.copytree(today[1] / "vae", tmp_path / "vae")
    name = "decoder.mid_block.attentions.0."
    rewrite(folder / UNET_FILE, lambda tensors: tensors | {f"{name}query.bias": tensors[f"{name}to_q.bias"]})
    with pytest.raises(ValueError, match=f"tensor '{name}to_q.bias' is also in .* as '{name}query.bias'"):
        load_network(VAE, folder)


def test_wrong_positions(today, tmp_path):
    folder = shutil.copytree(today[1] / "text_encoder", tmp_path / "text_encoder")
    rewrite(folder / TEXT_FILE, lambda tensors: tensors | {"embeddings.position_ids": np.arange(77)[None, ::-1].copy()})
    with pytest.raises(ValueError, match=r"tensor 'embeddings.position_ids' is not the constant \[\[0, 1, 2"):
        load_network(CLIPText, folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_prefix_of_a_wrapper_is_taken_off(today, tmp_path, prefix):
    folder = shutil.copytree(today[1] / "vae", tmp_path / "vae")
    rewrite(folder / UNET_FILE, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert_equal(load_network(VAE, folder), load_network(VAE, today[1] / "vae"))


def test_weights_that_are_not_finite_are_refused(today, tmp_path):
    folder = shutil.copytree(today[1] / "vae", tmp_path / "vae")
    rewrite(folder / UNET_FILE, lambda tensors: tensors | {"quant_conv.bias": np.full_like(tensors["quant_conv.bias"], np.nan)})
    with pytest.raises(ValueError, match=r"tensor 'quant_conv.bias' holds 8 numbers that are not finite as float32"):
        load_network(VAE, folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643276\n"


@pytest.mark.parametrize(("data", "message"), [(POINTER, "is a pointer of Git LFS"), (b"", "is empty: download it again")])
def test_what_stands_in_for_weights_is_named(today, tmp_path, data, message):
    folder = shutil.copytree(today[1] / "vae", tmp_path / "vae")
    (folder / UNET_FILE).write_bytes(data)
    with pytest.raises(ValueError, match=f"{UNET_FILE} {message}"):
        load_network(VAE, folder)


# --- shards


def shard(folder, count=3):
    """Splits the file of a folder, as transformers and diffusers split large ones."""
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    names, files = {}, [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(part, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / f"{UNET_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return files


def test_shards_by_diffusers(folder, tmp_path):
    diffusers.UNet2DConditionModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_equal(load_network(UNet, tmp_path / "sharded"), load_network(UNet, folder))


def test_shards_that_disagree_with_their_index(folder):
    first, second, _ = shard(folder)
    load_network(UNet, folder)
    kept = (folder / second).read_bytes()
    (folder / second).write_bytes((folder / first).read_bytes())
    with pytest.raises(ValueError, match=f"{second}: tensor '.*' is also in .*{first}"):
        load_network(UNet, folder)
    (folder / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json lists {second}, which is not in"):
        load_network(UNet, folder)
    (folder / second).write_bytes(kept)
    rewrite(folder / second, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(ValueError, match=f"index.json lists tensor '.*' in {second}, against that file"):
        load_network(UNet, folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"conv_in.bias": "../unet.safetensors"}}'])
def test_bad_index(folder, text):
    shard(folder)
    (folder / f"{UNET_FILE}.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match="index.json (is not an index|lists unet.safetensors)"):
        load_network(UNet, folder)


# --- the tokenizer


def test_tokens_are_those_of_transformers(today):
    pipe, folder = today
    prompts = ["a cat", "", "CATS, and a cat!"]
    ids = tokenize(load_tokenizer(folder / "tokenizer"), prompts)
    assert ids.dtype == np.int32 and ids.shape == (3, 77)
    expected = pipe.tokenizer(prompts, padding="max_length", max_length=77).input_ids
    np.testing.assert_array_equal(ids, expected)
    begin, cat, end = (pipe.tokenizer.convert_tokens_to_ids(w) for w in ("<|startoftext|>", "cat</w>", "<|endoftext|>"))
    assert ids[0, 0] == begin and ids[0, 2] == cat and np.all(ids[0, 3:] == end) and np.all(ids[1, 1:] == end)


def test_long_prompts_are_cut_on_request_alone(today):
    tokenizer = load_tokenizer(today[1] / "tokenizer")
    prompt = "cat " * 100
    with pytest.raises(ValueError, match="has 102 tokens, over 77: shorten it or pass truncate=True"):
        tokenize(tokenizer, [prompt])
    ids = tokenize(tokenizer, [prompt], truncate=True)
    assert ids.shape == (1, 77) and ids[0, -1] == tokenizer.eos_token_id
    with pytest.raises(TypeError, match="prompts='a cat' must be a sequence of strings"):
        tokenize(tokenizer, "a cat")


@pytest.mark.slow
def test_encoding_is_the_pipelines(today):
    pipe, folder = today
    with torch.no_grad():
        expected, empty = pipe.encode_prompt(["a cat", "cats"], "cpu", 1, True, negative_prompt=["", ""])
    model = load_folder(folder)
    assert relative(model.encode(["a cat", "cats"]), expected) < GATE
    assert relative(model.encode(["", ""]), empty) < GATE


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json", "special_tokens_map.json"), ("vocab.json",), ("merges.txt",)])
def test_a_tokenizer_without_its_whole_vocabulary_is_refused(today, tmp_path, kept):
    """Not every prompt taken for the same two words, blind to text."""
    folder = tmp_path / "model"
    shutil.copytree(today[1], folder)
    original_layout(folder)  # with vocab.json and merges.txt
    for file in (folder / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    with pytest.raises(
        ValueError, match=r"tokenizer(: the tokenizer has \d+ tokens, but the text encoder has 516| holds no CLIP)"
    ):
        load_folder(folder)


MISFITS = [("unet", "cross_attention_dim", 48, "hidden_size=24"), ("unet", "in_channels", 9, "latent_channels=4"),
           ("unet", "out_channels", 8, "in_channels=4"), ("vae", "latent_channels", 8, "latent_channels=8")]  # fmt: skip


@pytest.mark.parametrize(("part", "entry", "value", "other"), MISFITS)
def test_parts_that_do_not_go_together_are_refused_by_their_descriptions(today, tmp_path, part, entry, value, other):
    folder = tmp_path / "model"
    shutil.copytree(today[1], folder, ignore=shutil.ignore_patterns("*.safetensors"))  # which are not read
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=rf"unet.config.json: .*{other}.* these parts are not of one text-to-image model"):
        load_folder(folder)
