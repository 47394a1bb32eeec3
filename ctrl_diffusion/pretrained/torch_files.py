"""Reads files of `torch.save` (`.pt`, `.pth`, `.bin`) without torch, and without running pickled code.

Such a file is a zip archive. One pickle describes the tensors. Each storage, the bytes of one or more tensors, is an entry of its own. A
pickle is a program that can call any function by name. Here it can only use the dozen names of `KNOWN`, which build descriptions of
tensors. Any other name is refused before it is looked up.
"""

import collections
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .stored import Stored

# Type by name: torch's, safetensors', numpy's.
TYPES = {
    "double": ("F64", np.dtype(np.float64)),
    "float": ("F32", np.dtype(np.float32)),
    "half": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(jnp.bfloat16)),
    "long": ("I64", np.dtype(np.int64)),
    "int": ("I32", np.dtype(np.int32)),
    "short": ("I16", np.dtype(np.int16)),
    "char": ("I8", np.dtype(np.int8)),
    "byte": ("U8", np.dtype(np.uint8)),
    "bool": ("BOOL", np.dtype(np.bool_)),
}
STORAGES = {
    "DoubleStorage": "double",
    "FloatStorage": "float",
    "HalfStorage": "half",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "long",
    "IntStorage": "int",
    "ShortStorage": "short",
    "CharStorage": "char",
    "ByteStorage": "byte",
    "BoolStorage": "bool",
}
OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how torch before 1.6 begins a file


class Storage(NamedTuple):
    """The bytes of tensors: `length` numbers of a type, in the archive's entry `data/<key>`."""

    kind: str
    key: str
    length: int


class Tensor(NamedTuple):
    """A strided view of a storage. Offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Known:
    """The object that replaces a name in the pickle. A pickle can call it but not change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments):
        return self._call(*arguments)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"it sets the attribute {name!r} of something that is none of its own")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes what a name stands for")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2, checked."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("it describes a tensor that is none")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if math.prod(shape) and last >= storage.length:
        raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} leaves its storage {storage.key!r}")
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _nothing(*_: Any) -> None:
    """Replaces names that do not affect the numbers, such as a device."""


KNOWN: Mapping[tuple[str, str], Known] = {
    ("collections", "OrderedDict"): Known(collections.OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): Known(_tensor),
    ("torch._utils", "_rebuild_parameter"): Known(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): Known(lambda tensor, *_: tensor),
    ("torch", "Size"): Known(tuple),
    ("torch", "device"): Known(_nothing),
    ("torch.nn.parameter", "Parameter"): Known(lambda tensor, *_: tensor),
    **{("torch", name): Known(_nothing) for name in (*STORAGES, "float32", "float64", "float16", "bfloat16", "int64", "int32")},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler for the names of `KNOWN` and for storages."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.kinds = {id(KNOWN["torch", name]): kind for name, kind in STORAGES.items()}

    def find_class(self, module_name: str, global_name: str) -> Known:
        if (module_name, global_name) not in KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which is no part of a tensor and is not run: save the tensors alone "
                "(a state_dict) with torch"
            )
        return KNOWN[module_name, global_name]

    def persistent_load(self, pid: Any) -> Storage:
        what, cls, key, _, count = pid
        if what != "storage" or id(cls) not in self.kinds or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError(f"it describes a storage that is none: {pid!r}")
        return Storage(self.kinds[id(cls)], key, count)


def read_torch_file(file: Path, *inside: str) -> dict[str, Stored]:
    """The tensors of a file by name. They are not read yet.

    Args:
        file: a file of `torch.save`, version 1.6 or later.
        inside: keys that lead to the dictionary of tensors, for example `"state_dict"` (default: the outermost dictionary).

    Raises:
        ValueError: if the file is truncated, has another format, or holds anything but tensors and containers of tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    tree, root, sizes = _unpickled(file)
    for depth, key in enumerate(inside):
        if not isinstance(tree, Mapping) or key not in tree:
            raise ValueError(f"{file} holds no {'.'.join(inside[: depth + 1])!r}, but {_outline(tree)}.")
        tree = tree[key]
    if not isinstance(tree, Mapping):
        raise ValueError(f"{file} holds {_outline(tree)} instead of tensors by name.")
    found: dict[str, Stored] = {}
    for name, tensor in _leaves(file, tree):
        if name in found:
            raise ValueError(f"{file}: two tensors are called {name!r}.")
        found[name] = _stored(file, root, sizes, name, tensor)
    return found


def _unpickled(file: Path) -> tuple[Any, str, dict[str, int]]:
    """The pickled object, the folder inside the archive, and the size of every entry."""
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as opened:
            old = opened.read(len(OLD_MAGIC)) == OLD_MAGIC
        what = (
            "in the format of torch before 1.6: load and save it with a newer one"
            if old
            else "truncated or no file of torch.save"
        )
        raise ValueError(f"{file} is {what}.")
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            root = _root(sizes)
            if f"{root}/byteorder" in sizes and archive.read(f"{root}/byteorder") != b"little":
                raise ValueError("it was written on a big-endian machine")
            return _Unpickler(archive.read(f"{root}/data.pkl")).load(), root, sizes
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{file} is not read: {error}.") from error


def _root(sizes: Mapping[str, int]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in sizes if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}/constants.pkl" in sizes:
        what = "a TorchScript program" if roots else "a zip archive without data.pkl"
        raise ValueError(f"it is {what} and not a file of torch.save; save the state_dict of the model with torch")
    return roots[0]


def _leaves(file: Path, tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries and lists, by dotted name. Other leaves are ignored."""
    if len(path) > 50:
        raise ValueError(f"{file}: more than 50 containers lie in each other, below {'.'.join(path[:5])!r}.")
    if isinstance(tree, Tensor):
        yield ".".join(path), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(file, value, (*path, str(key)))
    elif isinstance(tree, list | tuple) and not isinstance(tree, Storage):
        for i, value in enumerate(tree):
            yield from _leaves(file, value, (*path, str(i)))


def _outline(tree: Any) -> str:
    return f"a dictionary with {', '.join(map(repr, list(tree)[:5]))}" if isinstance(tree, Mapping) else type(tree).__name__


def _stored(file: Path, root: str, sizes: Mapping[str, int], name: str, tensor: Tensor) -> Stored:
    code, dtype = TYPES[tensor.storage.kind]
    entry = f"{root}/data/{tensor.storage.key}"
    if sizes.get(entry) != tensor.storage.length * dtype.itemsize:
        raise ValueError(
            f"{file}: tensor {name!r} needs {tensor.storage.length * dtype.itemsize} bytes in {entry}, which has {sizes.get(entry)}."
        )
    return Stored(file, name, tensor.shape, code, functools.partial(_read, file, entry, dtype, tensor))


def _read(file: Path, entry: str, dtype: np.dtype, tensor: Tensor) -> np.ndarray:
    """Read one tensor. Its whole storage is in memory meanwhile."""
    try:
        with zipfile.ZipFile(file) as archive:
            numbers = np.frombuffer(archive.read(entry), dtype)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, dtype)
    strides = [step * dtype.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False).copy()
