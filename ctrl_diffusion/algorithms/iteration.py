"""The order of an iteration, written once. The argument `call` decides whether its programs are run, lowered or timed.

split_keys -> draw -> (sample -> annotate -> reward) per part -> join -> remember -> summarise -> prepare
      -> (shuffle -> (select -> update) per minibatch, or sweep) per epoch -> finish
"""

from collections.abc import Callable
from typing import Any

from ..estimators import Models
from .collect import Keys
from .recipe import Recipe
from .training import Info, Learned, State

Call = Callable[..., Any]
"""`call(name, *arguments)`: the results of the program `name`, or their shapes."""


def iterate(call: Call, recipe: Recipe, fixed: Any, key: Any, state: State) -> tuple[State, Info]:
    """One iteration of the algorithm that `recipe` describes; `fixed` holds the arrays of its control and reward."""
    keys = call("split_keys", key)
    fresh, terms, cond = collect_paths(call, recipe, fixed, keys, state)
    kl_weight, ends, shown = call("summarise", state.kl_weight, fresh, terms)
    buffer, rollout = call("remember", keys.replay, state.buffer, fresh)
    rewards = fresh.reward
    del fresh, terms  # arrays that nothing needs any more are freed before the updates
    models = Models(state.reference, state.value_params)
    transitions, metrics = call("prepare", fixed, keys.times, models, state.kl_weight, rollout)
    del rollout, models
    learned, history = train(call, recipe, fixed, keys, state, transitions)
    metrics = metrics | history[-1] | shown
    if recipe.trust_region.once:
        learned, found = call("finish", learned, fixed, state.reference, state.kl_weight, transitions)
        metrics |= found
    if "max_log_ratio" in history[0]:
        metrics["first_log_ratio"] = history[0]["max_log_ratio"]
    return State(learned, state.reference, buffer, kl_weight), Info(metrics, ends, rewards, cond)


def collect_paths(call: Call, recipe: Recipe, fixed: Any, keys: Keys, state: State) -> tuple[Any, Any, Any]:
    """Paths of an iteration with their rewards, the terms of the rewards, and the conditions.

    All parts are sampled before the first reward is computed: while the host computes the rewards of one part, the devices sample the
    next.
    """
    behaviour = recipe.behaviour.policy(state.params, state.reference)
    cond = call("draw", keys.conditions)
    parts = []
    for part in range(recipe.training.rollouts):
        path, of_part = call("sample", fixed, keys.paths, behaviour, cond, part)
        parts.append((path, call("annotate", fixed, behaviour, state.reference, path, of_part)))
        del path
    rewarded = [call("reward", fixed, *parts.pop(0)) for _ in range(len(parts))]
    if len(rewarded) == 1:
        return *rewarded[0], cond
    return *call("join", *map(list, zip(*rewarded))), cond


def train(call: Call, recipe: Recipe, fixed: Any, keys: Keys, state: State, transitions: Any) -> tuple[Learned, list[Any]]:
    """All passes over the transitions; returns metrics of every update. A pass in one program gives those of its first and last."""
    learned, history = state.learned, []
    for key in keys.shuffles:
        order = call("shuffle", key)
        learned, metrics = one_pass(call, recipe, fixed, learned, state, transitions, order)
        history += metrics
    return learned, history


def one_pass(
    call: Call, recipe: Recipe, fixed: Any, learned: Learned, state: State, transitions: Any, order: Any
) -> tuple[Learned, list[Any]]:
    """The updates of one pass. They consume `learned`; `state` has the reference and the temperature."""
    if recipe.training.scan_minibatches:
        return call("sweep", learned, fixed, state.reference, state.kl_weight, transitions, order)
    history = []
    for i in range(recipe.training.minibatches):
        learned, metrics = one_update(call, fixed, learned, state, transitions, order, i)
        history.append(metrics)
    return learned, history


def one_update(
    call: Call, fixed: Any, learned: Learned, state: State, transitions: Any, order: Any, i: int
) -> tuple[Learned, Any]:
    """The update on minibatch `i`."""
    some = call("select", transitions, order, i)
    return call("update", learned, fixed, state.reference, state.kl_weight, some)
