"""Reads and writes LoRA in the files of diffusers and of peft, and reads those of kohya's scripts and of ComfyUI (`kohya.py`).

| | diffusers | peft |
|---|---|---|
| file | `pytorch_lora_weights.safetensors` | `adapter_model.safetensors`, `adapter_config.json` |
| tensors | `unet.<layer>.lora.down.weight` `[r, i]`, `.up.weight` `[o, r]` | `base_model.model.<layer>.lora_A.weight`, `lora_B` |
| alpha | `r`, unless the file's metadata hold a description as peft's | `lora_alpha`, `alpha_pattern` |

Reading accepts the names of both in either file, because diffusers itself writes both spellings, with and without `unet.`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..folders import StrPath, replaced
from ..pretrained.config import parse_json
from ..pretrained.names import Names
from ..pretrained.stored import Stored
from ..pretrained.weights import check_finite, read_headers
from .kohya import from_kohya
from .lora import LoRA, lora_layers, matches, pointwise_layers, put, some_lora
from .unet import UNet

STEMS = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model"}
CONFIG = "adapter_config.json"
FILES = {CONFIG, *(f"{stem}.safetensors" for stem in STEMS.values())}
METADATA = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
FLOATS = ("F16", "BF16", "F32")  # exact in float32
SPELLINGS = Names(
    renamed=(),
    older=(
        (r"^(unet|base_model\.model)\.", ""),
        (r"\.processor\.", "."),  # before diffusers 0.22
        (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
        (r"\.to_out_lora\.", ".to_out.0.lora."),
        (r"\.lora_A\.weight$", ".lora.down.weight"),
        (r"\.lora_B\.weight$", ".lora.up.weight"),
    ),
)
# entries of a description that say nothing about the function, and those that are followed; any other must be empty
SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
FOLLOWED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"}


class Found(NamedTuple):
    """The two tensors of a layer in a file. They are not read yet."""

    down: Stored
    up: Stored

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def save_lora(network: UNet, folder: StrPath, format: str = "diffusers") -> None:
    """Write a UNet's LoRA. `folder` is replaced as a whole and is never half-written.

    Args:
        network: the UNet.
        folder: a new folder, or one with nothing but LoRA in it.
        format: "diffusers", for `StableDiffusionPipeline.load_lora_weights`, or "peft", for `PeftModel.from_pretrained`. Readers of
            diffusers' files set alpha to the rank, so `up` is written times `alpha / rank`. Files of peft keep alpha.
    """
    if format not in STEMS:
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, STEMS))}.")
    layers = {name: lora for name, (_, lora) in some_lora(network).items()}
    folder = Path(folder)
    others = sorted({path.name for path in folder.iterdir()} - FILES) if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which would be lost: LoRA is written into a folder of its own.")
    tensors: dict[str, np.ndarray] = {}
    for name, lora in layers.items():
        down, up = _to_file(lora, lora.down[...]), _to_file(lora, lora.up[...])
        if format == "diffusers":
            tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up * np.float32(lora.scale)}
        else:
            tensors |= {f"base_model.model.{name}.lora_{a}.weight": array for a, array in (("A", down), ("B", up))}
    with replaced(folder) as temporary:
        save_file(tensors, temporary / f"{STEMS[format]}.safetensors", {"format": "pt"})
        if format == "peft":
            (temporary / CONFIG).write_text(json.dumps(_description(layers), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _to_file(lora: LoRA, array: Any) -> np.ndarray:
    """`[i, o]` as `[o, i]`, for a convolution as `[o, i, 1, 1]`."""
    return np.ascontiguousarray(np.asarray(array).T).reshape(array.shape[::-1] + _pixel(lora.layer))


def _pixel(layer: Any) -> tuple[int, ...]:
    return (1,) * (layer.kernel.ndim - 2)


def _description(layers: Mapping[str, LoRA]) -> dict[str, Any]:
    ranks, alphas = ({name: getattr(lora, value) for name, lora in layers.items()} for value in ("rank", "alpha"))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": _number(a) for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(layers),
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def load_lora(network: UNet, path: StrPath) -> None:
    """Read LoRA into a UNet, in place. The files determine layers, ranks and alphas.

    If the UNet has LoRA already, it is replaced and must have the same layers. Everything is checked before the UNet is changed.

    Args:
        network: the UNet.
        path: a folder in the format of diffusers or of peft, or a safetensors file of any name in the format of diffusers, of kohya's
            scripts or of ComfyUI. All tensors must belong to the UNet.
    """
    file = _find(Path(path))
    layers, before = pointwise_layers(network), lora_layers(network)
    tensors = read_headers(file.parent, file.stem, SPELLINGS)
    tensors, given = from_kohya(tensors, layers, network.config.layers_per_block)
    found = _pairs(file, tensors)
    for name, pair in found.items():
        if name not in layers:
            raise ValueError(f"{file}: tensor {pair.down.name!r} is for {name}, no dense layer or 1x1 convolution of the UNet.")
        _check(pair, layers[name][1])
    if before and set(before) != set(found):
        raise ValueError(
            f"{file} has other layers than the network's LoRA (first: {min(set(before) ^ set(found))}): merge_lora(network) first, "
            "or read into a UNet without."
        )
    where, description = _read_description(file)
    alphas = {name: given.get(name, float(pair.rank)) for name, pair in found.items()}
    if description is not None:
        _check_description(where, description, set(layers), found)
        alphas = {name: _alpha(description, name, pair.rank) for name, pair in found.items()}

    def read(stored: Stored):
        array = stored.read()
        array = array.reshape(array.shape[:2]).T.astype(np.float32)
        check_finite(stored, array)
        return jnp.asarray(array)

    new = {name: LoRA(layers[name][1], read(pair.down), read(pair.up), alphas[name]) for name, pair in found.items()}
    if not any(jnp.any(lora.up[...]) for lora in new.values()):
        raise ValueError(f"{file} changes nothing: all its `up` are zero, as before training. Take the file of a later step.")
    for name, lora in new.items():
        put(network, layers[name][0], lora)


def _find(path: Path) -> Path:
    """The safetensors file of a folder, or the file itself."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file: convert it first (pickled files are not read).")
        return path
    present = [stem for stem in STEMS.values() if (path / f"{stem}.safetensors").is_file()]
    if len(present) != 1:
        files = " or ".join(f"{stem}.safetensors" for stem in STEMS.values())
        raise FileNotFoundError(
            f"{path} holds {'both' if present else 'neither'}: it needs {files}, and not two of them. A file of another name is given "
            "by its own path."
        )
    return path / f"{present[0]}.safetensors"


def _pairs(file: Path, tensors: Mapping[str, Stored]) -> dict[str, Found]:
    """The tensors by layer."""
    down, up = ".lora.down.weight", ".lora.up.weight"
    for name, stored in tensors.items():
        if not name.endswith((down, up)):
            raise ValueError(
                f"{file}: tensor {stored.name!r} is not part of a UNet's LoRA (lora.down, lora.up, lora_A or lora_B)."
            )
        other = name.removesuffix(down) + up if name.endswith(down) else name.removesuffix(up) + down
        if other not in tensors:
            raise ValueError(f"{file}: tensor {stored.name!r} has no counterpart: {other!r} is missing.")
    if not tensors:
        raise ValueError(f"{file} has no tensors.")
    layers = [name.removesuffix(down) for name in tensors if name.endswith(down)]
    return {name: Found(tensors[name + down], tensors[name + up]) for name in layers}


def _check(pair: Found, layer: Any) -> None:
    inputs, outputs = layer.kernel.shape[-2:]
    pixel = _pixel(layer)
    if len(pair.down.shape) != 2 + len(pixel) or pair.down.shape[1:] != (inputs, *pixel) or not pair.rank:
        raise ValueError(f"{_tensor(pair.down)}, but the UNet's layer needs {['rank', inputs, *pixel]}.")
    if pair.up.shape != (outputs, pair.rank, *pixel):
        raise ValueError(f"{_tensor(pair.up)}, but the UNet's layer and rank {pair.rank} need {[outputs, pair.rank, *pixel]}.")
    for stored in pair:
        if stored.dtype not in FLOATS:
            raise ValueError(
                f"{stored.file}: tensor {stored.name!r} is of type {stored.dtype}, which is none of {', '.join(FLOATS)}."
            )


def _tensor(stored: Stored) -> str:
    return f"{stored.file}: tensor {stored.name!r} is {list(stored.shape)}"


def _read_description(file: Path) -> tuple[str, dict[str, Any] | None]:
    """peft's description of its adapter, and the name of its file; `None` if a file of diffusers has no description."""
    if file.stem == STEMS["peft"]:
        path = file.with_name(CONFIG)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: it has alpha, without which {file.name} means nothing.")
        where, text = str(path), path.read_text(encoding="utf-8")
    else:
        with safe_open(file, framework="numpy") as opened:
            where, text = f"{file}: {METADATA}", (opened.metadata() or {}).get(METADATA)
    if not text:
        return where, None
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not a JSON object: {error}") from error
    return where, {name.removeprefix("unet."): value for name, value in values.items()}


def _check_description(where: str, values: Mapping[str, Any], layers: set[str], found: Mapping[str, Found]) -> None:
    if values.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{where}: peft_type={values['peft_type']!r} is not read: only LORA is.")
    if values.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{where}: init_lora_weights={values['init_lora_weights']!r} changes the UNet's own weights: not read."
        )
    for name, value in values.items():
        if name not in SILENT | FOLLOWED | {"init_lora_weights"} and value is not None and value is not False:
            if value not in ("none", {}, []):
                raise ValueError(f"{where}: {name}={value!r} is not read: it would change what the network computes.")
    for name in ("r", "lora_alpha"):
        if not isinstance(values.get(name), int | float):
            raise ValueError(f"{where}: {name}={values.get(name)!r} must be a number.")
    _check_patterns(where, values)
    for name, pair in found.items():
        rank = _of(values, "rank_pattern", "r", name)
        if rank != pair.rank:
            raise ValueError(f"{_tensor(pair.down)}, but {where} says rank {rank}.")
    expected = {name for name in layers if _selected(values.get("target_modules"), name)}
    expected -= {name for name in layers if _selected(values.get("exclude_modules"), name)}
    for name in sorted(expected - set(found)) if values.get("target_modules") else ():
        raise ValueError(f"{next(iter(found.values())).down.file}: the tensors of {name} are missing, which {where} targets.")


def _check_patterns(where: str, values: Mapping[str, Any]) -> None:
    """`ValueError` for the first pattern that is no regular expression."""
    lists = {name: list(values.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    texts = {name: [values[name]] for name in ("target_modules", "exclude_modules") if isinstance(values.get(name), str)}
    for name, patterns in (lists | texts).items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where}: {name} has {pattern!r}, which is no regular expression: {error}.") from error


def _selected(targets: Any, name: str) -> bool:
    """peft's rule for targets: a list has ends of names, a string is a pattern."""
    return bool(re.fullmatch(targets, name)) if isinstance(targets, str) else matches(name, targets or ())


def _of(values: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    """A description's value for one layer: that of the first pattern that matches the end of its name, or the default."""
    for pattern, value in (values.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return values[default]


def _alpha(values: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = float(_of(values, "alpha_pattern", "lora_alpha", name))
    return alpha * math.sqrt(rank) if values.get("use_rslora") else alpha
