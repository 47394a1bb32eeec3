"""LoRA (Hu et al. 2021): changes of low rank to a UNet's dense layers, which fine-tuning trains instead of the UNet itself.

    add_lora(unet, rank=4, rngs=nnx.Rngs(0))                    # changes nothing yet
    function, lora, base = split_lora(unet)
    gradients = jax.grad(lambda lora: loss(function(lora, base, x, timesteps, context)))(lora)
    nnx.update(unet, lora)                                      # trained parameters, back into the network

Layers have the names of diffusers and peft: `mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..pretrained.names import Path
from .unet import NAMES, UNet

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Layer = nnx.Linear | nnx.Conv

# uniform within +-1 / sqrt(inputs), as peft draws
DOWN = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRA(nnx.Module):
    """`layer(x) + (alpha / rank) x down up`, in the type of `layer(x)`; `down` and `up` are float32.

    Args:
        layer: a dense layer or a 1x1 convolution.
        down: `[inputs, rank]`.
        up: `[rank, outputs]`.
        alpha: the change is multiplied by `alpha / rank`.
    """

    def __init__(self, layer: Layer, down: Float[Array, "i r"], up: Float[Array, "r o"], alpha: float):
        self.layer, self.alpha = layer, alpha
        self.down, self.up = nnx.LoRAParam(down), nnx.LoRAParam(up)

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    @property
    def scale(self) -> float:
        """The factor of the product of `down` and `up`."""
        return self.alpha / self.rank

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = self.layer(x)
        down, up = self.down[...].astype(y.dtype), self.up[...].astype(y.dtype)
        inner = jnp.matmul(x.astype(y.dtype), down, precision=self.layer.precision)
        return y + self.scale * jnp.matmul(inner, up, precision=self.layer.precision)


def add_lora(
    network: UNet, rank: int, *, alpha: int | float | None = None, targets: Sequence[str] = ATTENTION, rngs: nnx.Rngs
) -> None:
    """Add a change of low rank to layers of a UNet, in place. It is exactly zero at first, because `up` is zero.

    Call it again to give other layers another rank.

    Args:
        network: the UNet.
        rank: rank of the change.
        alpha: the change is multiplied by `alpha / rank` (default: `rank`).
        targets: ends of names of dense layers and 1x1 convolutions, in whole words between dots (default: all attention).
        rngs: random keys of `down`.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    alpha = float(rank if alpha is None else alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha} must be positive: the change is multiplied by alpha / rank.")
    if isinstance(targets, str):
        raise TypeError(f"targets={targets!r} must be a sequence of strings: pass [targets].")
    if not targets:
        raise ValueError(f"targets={targets!r} names no layer: leave it out for all attention.")
    layers, present = pointwise_layers(network), lora_layers(network)
    found = [name for name in layers if matches(name, targets)]
    for target in targets:
        others = [name for name in _convolutions(network) if matches(name, [target])]
        if others:
            raise ValueError(f"targets: {target!r} is {others[0]}, a convolution of more than one pixel: LoRA is for 1x1.")
        if not any(matches(name, [target]) for name in found):
            ends = sorted({re.search(r"[a-z_]\w*(\.\d+)*$", name)[0] for name in layers})  # pyright: ignore[reportOptionalSubscript]
            raise ValueError(
                f"targets: {target!r} ends the name of no dense layer or 1x1 convolution: take from {', '.join(ends)}."
            )
    for name in found:
        if name in present:
            raise ValueError(f"targets: {name} has LoRA already: merge_lora(network) first, or choose other layers.")
    for name in found:
        path, layer = layers[name]
        inputs, outputs = layer.kernel.shape[-2:]
        down = DOWN(rngs.params(), (inputs, rank), jnp.float32)
        put(network, path, LoRA(layer, down, jnp.zeros((rank, outputs), jnp.float32), alpha))


def lora_parameters(network: UNet) -> Any:
    """`down` and `up` of all layers, and nothing else."""
    return nnx.state(network, nnx.LoRAParam)


Split = tuple[Callable[..., Float[Array, "b h w out"]], Any, Any]


def split_lora(network: UNet) -> Split:
    """A UNet as `(function, lora, base)` with `function(lora, base, x, timesteps, context)`.

    `lora` holds the trained parameters, `base` all others. `base` is an argument, too, because arrays inside a compiled function are
    written into its program, which takes gigabytes for a full-sized UNet.
    """
    some_lora(network)
    return _split(network, nnx.LoRAParam)


def split_full(network: UNet) -> Split:
    """A UNet without LoRA in the form of `split_lora`, for full fine-tuning: all parameters are trained, and `base` is empty."""
    if lora_layers(network):
        raise ValueError("network has LoRA: train it alone, split_lora(network), or merge_lora(network) first.")
    return _split(network, nnx.Param)


def _split(network: UNet, trained: type[nnx.Variable]) -> Split:
    graphdef, params, base = nnx.split(network, trained, ...)

    def function(params, base, x, timesteps, context):
        return nnx.merge(graphdef, params, base)(x, timesteps, context)

    return function, params, base


def merge_lora(network: UNet) -> None:
    """Add the changes to the kernels and remove LoRA, in place."""
    for path, lora in some_lora(network).values():
        kernel = lora.layer.kernel
        change = lora.scale * jnp.matmul(lora.down[...], lora.up[...], precision=jax.lax.Precision.HIGHEST)
        kernel[...] = (kernel[...] + change.reshape(kernel.shape)).astype(kernel.dtype)
        put(network, path, lora.layer)


def matches(name: str, targets: Iterable[str]) -> bool:
    """Whether a layer's name is, or ends in, one of the targets (peft's rule)."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pointwise_layers(network: UNet) -> dict[str, tuple[Path, Layer]]:
    """All dense layers and 1x1 convolutions by name, with their paths. A layer with LoRA has the path of its LoRA."""
    return {name: found for name, found in _layers(network) if _is_pointwise(found[1])}


def lora_layers(network: UNet) -> dict[str, tuple[Path, LoRA]]:
    """All layers that have LoRA by name, with their paths."""
    return {NAMES.module(path): (path, module) for path, module in nnx.iter_modules(network) if isinstance(module, LoRA)}


def put(network: UNet, path: Path, module: Any) -> None:
    """Replace the module at a path."""
    parent: Any = network
    for key in path[:-1]:
        parent = parent[key] if isinstance(key, int) else getattr(parent, key)
    setattr(parent, path[-1], module)


def some_lora(network: UNet) -> dict[str, tuple[Path, LoRA]]:
    found = lora_layers(network)
    if not found:
        raise ValueError("network has no LoRA: add_lora(network, rank, rngs=...) or load_lora(network, folder) first.")
    return found


def _layers(network: UNet):
    changed = {path for path, _ in lora_layers(network).values()}
    for path, module in nnx.iter_modules(network):
        if isinstance(module, Layer):
            path = path[:-1] if path[:-1] in changed else path
            yield NAMES.module(path), (path, module)


def _is_pointwise(layer: Layer) -> bool:
    return isinstance(layer, nnx.Linear) or math.prod(layer.kernel.shape[:-2]) == 1


def _convolutions(network: UNet) -> list[str]:
    return [name for name, (_, layer) in _layers(network) if not _is_pointwise(layer)]
