"""The programs of an iteration, lowered to be looked at: memory, collectives and operations, on devices that need not be here."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from ..estimators import Models
from ..objective import Rollout
from ..parallel import Layout
from ..process import Params
from ..states import memory_shardings
from .training import Algorithm, State


def lower(algorithm: Algorithm, layout: Layout, params: Params, value_params: Params = ()) -> dict[str, Lowered]:
    """Every program of an iteration, lowered for arguments of the shapes and shardings that it has in `algorithm.step`.

    Args:
        algorithm: composed with `layout`, whose mesh may be of devices that are described only (a TPU topology).
        layout: where the arrays are.
        params, value_params: as for `algorithm.init`, arrays or `jax.ShapeDtypeStruct`s.
    """
    programs = algorithm.programs

    def placed(tree: Any, shardings) -> Any:
        if layout.mesh is None:
            return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings(tree))

    found: dict[str, Lowered] = {}

    def call(name: str, *args: Any) -> Any:
        found[name] = getattr(programs, name).lower(*args)
        return jax.eval_shape(getattr(programs, name), *args)

    key = placed(jax.eval_shape(lambda: jax.random.key(0)), layout.replicated)
    state: State = jax.eval_shape(algorithm.init, params, value_params)
    memory = placed(state.memory, partial(memory_shardings, layout))
    params, reference, value_params, opt, value_opt, _, average = (placed(v, layout.parameters) for v in state)
    models = Models(reference, value_params)

    def rollout(v: Rollout) -> Rollout:
        return placed(v, partial(memory_shardings, layout))

    fixed = placed(algorithm.fixed, layout.parameters)
    cond = placed(call("draw", key), layout.batch)
    path, ends, of_part = call("collect", fixed, key, params, cond, jax.ShapeDtypeStruct((), jnp.int32))
    path = path._replace(
        t=placed(path.t, layout.replicated),
        **{name: placed(getattr(path, name), partial(layout.batch, axis=1)) for name in ("x", "noise")},
    )
    of_part = placed(of_part, layout.batch)
    a_old, a_ref, x_hat, _ = call("annotate", fixed, params, reference, path, of_part)
    size, n = ends.shape[0], a_old.shape[0]
    r, r_hat = jax.ShapeDtypeStruct((size,), ends.dtype), jax.ShapeDtypeStruct((n, size), ends.dtype)
    fresh = rollout(Rollout(path.t, path.x, path.noise, a_old, a_ref, x_hat, r_hat, r, of_part))  # pyright: ignore[reportArgumentType]
    if algorithm.rollouts > 1:
        fresh = rollout(call("join", [fresh] * algorithm.rollouts, [{}] * algorithm.rollouts)[0])
    _, trained_on = call("remember", key, memory, fresh)
    rows, _ = call("prepare", fixed, key, models, rollout(trained_on))
    rows, order = placed(rows, layout.batch), placed(jax.eval_shape(programs.shuffle, key), partial(layout.batch, axis=1))
    learned = (params, value_params, opt, value_opt, average)
    if algorithm.scan_minibatches:
        call("sweep", learned, fixed, reference, rows, order)
    else:
        some = placed(call("select", rows, order, jax.ShapeDtypeStruct((), jnp.int32)), layout.batch)
        call("update", learned, fixed, reference, some)
    call("finish", (params, average), fixed, models, rows)
    return found
