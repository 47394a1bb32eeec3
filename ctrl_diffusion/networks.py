"""Small networks in flax NNX, and functions that make controls and values from networks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .predictions import Prediction, V
from .process import ControlFn, DiffusionProcess, check_shape


class TimeEmbedding(nnx.Module):
    """Sines and cosines of `t` at `features / 2` frequencies, spaced geometrically from pi/2 to 64 pi, and a dense layer."""

    def __init__(self, features: int, rngs: nnx.Rngs, dtype: Any = None):
        self.frequencies = nnx.static(tuple(0.5 * math.pi * 128 ** (i / (features // 2 - 1)) for i in range(features // 2)))
        self.dense = nnx.Linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b f"]:
        angles = t[:, None] * jnp.asarray(self.frequencies, t.dtype)
        return self.dense(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))


class ResidualBlock(nnx.Module):
    """`h + W2 silu(W1 norm(h) (1 + scale(t)) + shift(t))`; the last layer starts at zero."""

    def __init__(self, width: int, rngs: nnx.Rngs, dtype: Any = None):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.inner = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "b w"], time: Float[Array, "b w"]) -> Float[Array, "b w"]:
        scale, shift = jnp.split(self.modulation(nnx.silu(time)), 2, axis=-1)
        return h + self.outer(nnx.silu(self.inner(self.norm(h)) * (1 + scale) + shift))


class ResidualMLP(nnx.Module):
    """A residual network on the flattened state, `network(x [b, *x], t [b], cond) -> [b, *out]`. The output starts at zero.

    It consists of matrix products only, which makes it fast on CPUs for small images. It is unconditional: `cond` is ignored.

    Args:
        shape: shape of one state.
        out: shape of one output.
        width, depth: width and number of residual blocks.
        dtype: type of the matrix products, such as "bfloat16". Parameters, residuals, norms, sines and the output keep their type.
        rngs: random keys of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        out: tuple[int, ...],
        *,
        width: int = 256,
        depth: int = 3,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.shape, self.out = nnx.static(tuple(shape)), nnx.static(tuple(out))
        self.width, self.depth = width, depth
        self.embed = TimeEmbedding(width, rngs, dtype)
        self.enter = nnx.Linear(math.prod(shape), width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, rngs, dtype) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.leave = nnx.Linear(width, math.prod(out), kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that rebuild this architecture; `ctrl_diffusion.save` writes them."""
        found = {"shape": self.shape, "out": self.out, "width": self.width, "depth": self.depth}
        return found | ({} if self.dtype is None else {"dtype": self.dtype})

    def __call__(self, x: Float[Array, "b *x"], t: Float[Array, " b"], cond: Any = None) -> Float[Array, "b *out"]:
        time = self.embed(t)
        h = self.enter(x.reshape(x.shape[0], -1)).astype(x.dtype)
        for block in self.blocks:
            h = block(h, time)
        return self.leave(nnx.silu(self.norm(h))).astype(x.dtype).reshape((x.shape[0],) + self.out)


def _batched(t, x):
    return jnp.broadcast_to(t, (x.shape[0],)).astype(x.dtype)


def split(network: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """The network's static part and its parameters. `ValueError` if it has other state."""
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError(
            f"network {type(network).__name__} holds state besides parameters ({list(nnx.to_flat_state(rest))[:3]}...): controls are "
            "pure functions, so use layers without mutable state (no batch statistics, no dropout keys)."
        )
    return graphdef, params


@dataclasses.dataclass(frozen=True)
class NetworkScore:
    """The control of a network: its prediction, turned into a score. Equal for networks of one architecture, whatever their parameters."""

    graphdef: nnx.GraphDef = dataclasses.field(repr=False)
    process: DiffusionProcess = dataclasses.field(repr=False)
    prediction: Prediction

    def __call__(self, params: Any, t: Any, x: Float[Array, "b *x"], cond: Any = None) -> Float[Array, "b *x"]:
        found = nnx.merge(self.graphdef, params)(x, _batched(t, x), cond)
        check_shape("the network", found, x)
        return self.prediction.to_score(self.process.schedule, self.process.tau(t), x, found)


def score_control(network: nnx.Module, process: DiffusionProcess, prediction: Prediction = V) -> tuple[ControlFn, Any]:
    """The control (a score) and the parameters of a network `network(x, t, cond)` that predicts `prediction`.

    The network gets control time as `t [b]`. Returns `(control, params)` with `control(params, t, x, cond) -> score`, `t` scalar or
    `[b]`. `ValueError`, when the control is first traced, if the network's output has not the shape of the states.
    """
    graphdef, params = split(network)
    return NetworkScore(graphdef, process, prediction), params


def value_network(network: nnx.Module) -> tuple[Callable[..., Float[Array, " b"]], Any]:
    """The function `F(params, t, x, cond) -> [b]` and the parameters of a network `network(x, t, cond) -> [b]`."""
    graphdef, params = split(network)

    def value(params, t, x, cond=None):
        return nnx.merge(graphdef, params)(x, _batched(t, x), cond)

    return value, params
