"""Reads and writes parameters of networks in safetensors files, one tensor at a time.

Every tensor of a file is used exactly once. All names, shapes and types are checked before the first tensor is read, and errors name files
and tensors.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from .config import read_json
from .names import Names, from_file, shape_in_file, to_file
from .stored import Stored

Network = TypeVar("Network", bound=nnx.Module)
# (name of the parameter, its shape in the network) -> where it goes; None: the default device
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and data parallelism put before all names of a network."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def find_files(folder: Path, stem: str) -> list[Path]:
    """`<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists. Other files of the folder are ignored."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".ckpt", ".msgpack"))
        raise FileNotFoundError(
            f"{folder} holds no {single.name} and no {index.name}. Other weights there ({', '.join(others) or 'none'}) are not "
            "read: pickled files and variants must be saved as that file first."
        )
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise FileNotFoundError(f"{index} lists {file.name}, which is not in {folder}.")
    return files


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        return dict(read_json(index)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: it needs a JSON object with a weight_map.") from error


def read_headers(folder: Path, stem: str, names: Names) -> dict[str, Stored]:
    """The headers of a network's files: all tensors by today's names, not read yet."""
    found: dict[str, Stored] = {}
    files = find_files(folder, stem)
    for file in files:
        tensors = _tensors_of(file)
        prefix = next((p for p in WRAPPERS if tensors and all(stored.name.startswith(p) for stored in tensors)), "")
        for stored in tensors:
            today = names.today(stored.name.removeprefix(prefix))
            if today in found:
                other = found[today]
                raise ValueError(f"{file}: tensor {stored.name!r} is also in {other.file} as {other.name!r}.")
            found[today] = stored
    index = folder / f"{stem}.safetensors.index.json"
    if files != [folder / f"{stem}.safetensors"]:
        listed = set(_weight_map(index).items())
        for name, file in sorted(listed ^ {(stored.name, stored.file.name) for stored in found.values()}):
            what = "lists" if (name, file) in listed else "does not list"
            raise ValueError(f"{index} {what} tensor {name!r} in {file}, against that file: a shard is missing or replaced.")
    return found


def _tensors_of(file: Path) -> list[Stored]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return [
                Stored(file, name, tuple(s.get_shape()), s.get_dtype(), functools.partial(_read, file, name))
                for name, s in slices.items()
            ]
    except SafetensorError as error:
        raise ValueError(f"{file} {_why_not(file)}: {error}") from error


def _why_not(file: Path) -> str:
    """What a file is that is no safetensors file, and what to do."""
    with open(file, "rb") as opened:
        begin = opened.read(64)
    if begin.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights: run git lfs pull in its folder, or download the file itself"
    if not begin:
        return "is empty: download it again"
    return "is truncated or not a safetensors file"


def _read(file: Path, name: str) -> np.ndarray:
    """Read a tensor. The file is opened again for each one, because mapped pages count as memory of this process."""
    with safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


class _OneKey(nnx.Rngs):
    """Random keys for shapes only. Without it, counting keys during tracing takes most of the time."""

    def params(self):
        return jax.random.key(0)


def abstract_network(make: Callable[[nnx.Rngs], Network]) -> Network:
    """The network that `make` returns, with `jax.ShapeDtypeStruct`s as parameters: nothing is drawn or stored."""
    return nnx.eval_shape(lambda: make(_OneKey(0)))


def load_parameters(
    make: Callable[[nnx.Rngs], Network],
    folder: Path,
    stem: str,
    names: Names,
    *,
    cast: bool = False,
    sharding: Placement | None = None,
) -> Network:
    """`filled` from the safetensors files of a folder; for `folder` and `stem` see `find_files`."""
    found = read_headers(folder, stem, names)
    return filled(make, found, f"{folder / stem}.safetensors", names, "config.json", cast=cast, sharding=sharding)


def filled(
    make: Callable[[nnx.Rngs], Network],
    found: Mapping[str, Stored],
    where: str,
    names: Names,
    description: str,
    *,
    cast: bool = False,
    sharding: Placement | None = None,
) -> Network:
    """The network that `make` describes, with the parameters of files.

    No random parameters are drawn. Each tensor is read, transposed and placed before the next is read; so memory holds one tensor besides
    the network.

    Args:
        make: returns the network with random parameters; it is evaluated for their shapes only.
        found: all tensors of the files, by today's names.
        where, description: names of the files and of the network's description in errors.
        names: the names of the network's tensors.
        cast: convert tensors of another floating-point type to the parameters' type; else they are refused.
        sharding: where each parameter is placed (default: the default device).

    Raises:
        ValueError: if tensors are missing, superfluous, not finite, or have another shape or type.
    """
    graphdef, state = nnx.split(abstract_network(make))
    wanted = {names.tensor(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    constants = {name: value for name, value in names.constants if name in found and name not in wanted}
    for name, value in constants.items():
        _check_constant(found[name], value)
    found = {name: stored for name, stored in found.items() if name not in constants}
    _check_names(where, description, set(wanted), found)
    for name, (path, variable) in wanted.items():
        _check_tensor(found[name], shape_in_file(path, variable.shape), np.dtype(variable.dtype).name, description, cast)
    place = sharding or (lambda name, shape: None)

    def parameter(name, path, variable):
        array = np.ascontiguousarray(from_file(path, found[name].read()).astype(variable.dtype, copy=False))
        check_finite(found[name], array)
        return variable.replace(jax.device_put(array, place(".".join(map(str, path)), array.shape)))

    flat = [(path, parameter(name, path, variable)) for name, (path, variable) in wanted.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def check_finite(stored: Stored, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise ValueError(
            f"{stored.file}: tensor {stored.name!r} holds {np.count_nonzero(~np.isfinite(array))} numbers that are not finite as "
            f"{array.dtype}: the file is of a run that diverged, or its numbers are beyond the range of that type."
        )


def _check_constant(stored: Stored, value: np.ndarray) -> None:
    array = stored.read()
    if array.shape != value.shape or not np.array_equal(array, value):
        raise ValueError(f"{stored.file}: tensor {stored.name!r} is not the constant {value.tolist()} that this network has.")


def _check_names(where: str, description: str, wanted: set[str], found: Mapping[str, Stored]) -> None:
    missing, extra = sorted(wanted - set(found)), [stored for name, stored in sorted(found.items()) if name not in wanted]
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing: {_some(missing)}.")
    if extra:
        raise ValueError(
            f"{extra[0].file}: {len(extra)} tensors are not part of the network that {description} describes: "
            f"{_some([stored.name for stored in extra])}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _check_tensor(stored: Stored, shape: tuple[int, ...], dtype: str, description: str, cast: bool) -> None:
    where = f"{stored.file}: tensor {stored.name!r}"
    if stored.shape != shape:
        raise ValueError(f"{where} is {list(stored.shape)}, but {description} describes a network where it is {list(shape)}.")
    if stored.dtype not in DTYPES:
        raise ValueError(f"{where} is of type {stored.dtype}, which is none of {', '.join(DTYPES)}.")
    if DTYPES[stored.dtype] != dtype and not cast:
        raise ValueError(
            f"{where} is {DTYPES[stored.dtype]}, the parameters are {dtype}: pass cast=True to convert it, or param_dtype=... to "
            "keep the type of the file."
        )


def save_parameters(network: nnx.Module, file: Path, names: Names) -> None:
    """Write all parameters of a network to one safetensors file with today's names, one tensor after the other."""
    flat = {names.tensor(path): (path, variable[...]) for path, variable in nnx.to_flat_state(nnx.state(network))}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers before 5 asks whose axes these are
    end = 0
    for name, (path, array) in sorted(flat.items()):
        begin, end = end, end + array.nbytes
        dtype, shape = CODES[jnp.dtype(array.dtype).name], shape_in_file(path, array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, (path, array) in sorted(flat.items()):
            out.write(np.ascontiguousarray(to_file(path, np.asarray(array))).tobytes())
