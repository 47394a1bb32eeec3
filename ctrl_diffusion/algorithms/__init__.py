"""Algorithms: pairs of functions `init(params, ...) -> state` and `step(key, state) -> (state, info)`."""

from .policy_gradient import ddpo as ddpo, dpok as dpok
from .score_as_action import Algorithm as Algorithm, Info as Info, State as State, score_as_action as score_as_action
