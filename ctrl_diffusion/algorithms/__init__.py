"""Algorithms: pairs of functions `init(params, ...) -> state` and `step(key, state) -> (state, info)`."""

from .score_as_action import Algorithm as Algorithm
from .score_as_action import Info as Info
from .score_as_action import State as State
from .score_as_action import score_as_action as score_as_action
