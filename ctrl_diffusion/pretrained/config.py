"""Descriptions of networks, read from their `config.json`. An entry that is not implemented raises an error with its name and value.

The fields of a class are the free entries. `fixed` lists entries that must have one of the given values; the first value also holds for
a missing entry. `ignored` lists entries without effect. Any other entry is refused unless it is null.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import jax.numpy as jnp

Config = TypeVar("Config")
Fixed = Mapping[str, tuple[Any, ...]]


def read_config(cls: type[Config], path: Path) -> Config:
    """Read the description in a `config.json`. Errors name the file, the entry, its value and the supported values."""
    values = read_json(path)
    try:
        return parse_config(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte-order mark. `ValueError` names the file, and an entry that is there twice."""
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str) -> dict[str, Any]:
    """The object in a JSON text. An entry that is there twice, with two values, is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        for name, value in pairs:
            if repr(values[name]) != repr(value):  # a NaN is not equal to itself
                raise ValueError(f"{name} is there twice, as {value!r} and as {values[name]!r}: leave one of them.")
        return values

    values = json.loads(text, object_pairs_hook=once)
    if not isinstance(values, dict):
        raise ValueError("it must hold a JSON object.")
    return values


def parse_config(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Read a description from a dictionary; see `read_config`."""
    description: Any = cls
    free = {field.name: field.type for field in dataclasses.fields(description)}
    fixed, arguments = description.fixed, dict(description.absent)
    for name, value in values.items():
        value = _tuples(value)
        if name in free:
            if not _fits(value, free[name]):
                raise ValueError(f"{name}={value!r} is not supported: it must be {_spell(free[name])}.")
            arguments[name] = float(value) if free[name] is float else value
        elif name in fixed:
            if value not in fixed[name]:
                raise ValueError(f"{name}={value!r} is not supported: it must be {_either(fixed[name])}.")
        elif value is not None and name not in description.ignored and not (name.startswith("_") and name != "_class_name"):
            raise ValueError(
                f"{name}={value!r} is not supported: this library does not know the entry. Set it to null or remove it if the "
                "network does not depend on it."
            )
    return cls(**arguments)


def check_computing_type(dtype: Any, param_dtype: Any) -> None:
    """`ValueError` for networks that would compute in float16; `dtype=None` is the parameters' type."""
    if jnp.dtype(param_dtype if dtype is None else dtype) == jnp.float16:
        raise ValueError(
            "dtype=float16: networks do not compute in float16, whose range ends at 65504: activations overflow, and gradients would need "
            "a loss scale. Pass dtype=jnp.bfloat16 or dtype=jnp.float32; param_dtype may be float16 beside it."
        )


def config_values(config: Any) -> dict[str, Any]:
    """The entries to write into a `config.json`: all free and all fixed entries."""
    return {name: values[0] for name, values in config.fixed.items()} | dataclasses.asdict(config)


def one_per_block(config: Any, name: str, values: tuple, blocks: int) -> None:
    if len(values) != blocks:
        raise ValueError(f"{name}={values} must have one entry per entry of block_out_channels={config.block_out_channels}.")


def check_supported(name: str, values: set, supported: set) -> None:
    for value in sorted(values - supported):
        raise ValueError(f"{name} has {value!r}, which is not supported: it must be {_either(sorted(supported))}.")


def check_counts(config: Any, *, besides: tuple[str, ...] = ()) -> None:
    """`ValueError` for the first whole number of a description below 1; names in `besides` may be smaller."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < 1 and field.name not in besides:
                raise ValueError(f"{field.name}={value!r} must be at least 1.")


def groups_divide(config: Any) -> None:
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            raise ValueError(f"norm_num_groups={config.norm_num_groups} must divide block_out_channels={channels}.")


def _either(values: Any) -> str:
    return " or ".join(map(repr, values))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _spell(annotation: Any) -> str:
    if annotation is float:
        return "a finite float"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a JSON file has the annotated type. An int counts as a float; a bool does not count as an int."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        each = get_args(annotation)
        each = each[:1] * len(value) if isinstance(value, tuple) and each[-1] is Ellipsis else each
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
