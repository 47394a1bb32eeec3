"""Whatever comes in from outside is a right value or one of our errors: random prompt files, descriptions, weights, LoRA and rewards.

The examples are the same in every run.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save_file

from ctrl_diffusion.pretrained import abstract_network, parse_config, read_config, read_headers
from ctrl_diffusion.pretrained.names import Names
from ctrl_diffusion.scores import RewardError, as_numbers, check_numbers
from ctrl_diffusion.stable_diffusion import CLIPTextConfig, UNet, UNetConfig, VAEConfig, load_lora, parse_noising
from ctrl_diffusion.stable_diffusion.lora import pointwise_layers
from experiments.text_to_image.prompts import read_prompt_file

ours = settings(derandomize=True, max_examples=150, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@ours
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.lists(JSON, max_size=3).map(lambda rows: json.dumps(rows).encode())
    | st.lists(st.fixed_dictionaries({"prompt": JSON}), max_size=3).map(lambda v: "\n".join(map(json.dumps, v)).encode()),
    suffix=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]),
)
def test_prompt_files(folder, content, suffix):
    path = folder / f"prompts.{suffix}"
    path.write_bytes(content)
    try:
        prompts = read_prompt_file(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert prompts and all(prompt.text.strip() == prompt.text != "" and prompt.weight >= 1 for prompt in prompts)
    assert len({prompt.text for prompt in prompts}) == len(prompts)


ENTRIES = {
    cls: [*cls.__dataclass_fields__, *cls.fixed, *cls.ignored, "other"] for cls in (UNetConfig, VAEConfig, CLIPTextConfig)
}


@pytest.mark.parametrize("cls", ENTRIES, ids=lambda cls: cls.__name__)
def test_descriptions(cls):
    @ours
    @given(st.dictionaries(st.sampled_from(ENTRIES[cls]), JSON, max_size=2))
    def check(values):
        try:
            found = parse_config(cls, values)
        except ValueError as error:
            assert any(name in str(error) for name in [*values, *ENTRIES[cls]])
            return
        assert isinstance(found, cls)

    check()


@ours
@given(st.dictionaries(st.sampled_from(["_class_name", "beta_start", "beta_end", "steps_offset", "num_train_timesteps"]), JSON))
def test_noise(values):
    try:
        noising = parse_noising({"_class_name": "PNDMScheduler"} | values)
    except ValueError:
        return
    assert np.all((noising.betas > 0) & (noising.betas < 1))


@ours
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()))
def test_files_of_descriptions(folder, content):
    path = folder / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_config(UNetConfig, path), UNetConfig)
    except ValueError as error:
        assert str(error).startswith(str(path))


@ours
@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=4), st.integers(0, 200))
def test_headers_of_weights(folder, changes, length):
    """Bytes of a good file changed or cut off."""
    path = folder / "model.safetensors"
    save_file({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - length % 7 * (length > 100)])
    try:
        found = read_headers(folder, "model", Names(()))
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(math.prod(stored.shape) == stored.read().size for stored in found.values())


@pytest.fixture(scope="module")
def network():
    config = UNetConfig(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return abstract_network(lambda rngs: UNet(config, rngs=rngs))


LAYERS = ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "time_embedding.linear_1", "nothing", "conv_in")
FORMS = (
    *(("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"), ("{}.lora_A.weight", "{}.lora_B.weight")),
    *(("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"), ("lora_te_{}.lora_down.weight", "{}.alpha")),
)


SIZES = st.lists(st.sampled_from([0, 1, 2, 6, 8, 32]), min_size=1, max_size=3)


@ours
@given(st.sampled_from(LAYERS), st.sampled_from(FORMS), SIZES, st.booleans())
def test_files_of_lora(folder, network, layer, form, sizes, whole):
    path = folder / "lora.safetensors"
    name = layer.replace(".", "_") if form[0].startswith("lora_") else layer
    shapes = [tuple(sizes), tuple(sizes[::-1])]
    save_file({form.format(name): np.full(shape, 0.1, np.float32) for form, shape in zip(form, shapes[: 1 + whole])}, path)
    before = sorted(pointwise_layers(network))
    try:
        load_lora(network, path)
    except ValueError as error:
        assert str(path) in str(error)
    assert sorted(pointwise_layers(network)) == before


NUMBERS = st.floats() | st.integers(-(10**40), 10**40) | st.booleans() | st.none() | st.text(max_size=3) | st.complex_numbers()


@ours
@given(
    st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, st.just({})), max_leaves=5)
    | st.lists(st.floats(allow_nan=False, width=16), min_size=2, max_size=2).map(lambda v: np.asarray(v, np.float16))
)
def test_what_rewards_return(found):
    try:
        values = as_numbers("fuzzed", found, np.float32)
        check_numbers("fuzzed", values.shape, values, (2, 3))
    except RewardError as error:
        assert "'fuzzed'" in str(error)
        return
    assert values.shape == (2,) and values.dtype == np.float32 and np.all(np.isfinite(values))
