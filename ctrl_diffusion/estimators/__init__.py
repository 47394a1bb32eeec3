"""Estimators of the policy gradient: likelihood ratio, pathwise, matching, trajectory."""

from .base import AbstractEstimator as AbstractEstimator, Calls as Calls, Models as Models
from .likelihood_ratio import (
    LikelihoodRatio as LikelihoodRatio,
    WeightedLikelihood as WeightedLikelihood,
    exponential_increment as exponential_increment,
    exponential_return as exponential_return,
)
from .matching import (
    GradientBalance as GradientBalance,
    LeanAdjoint as LeanAdjoint,
    Matching as Matching,
    value_gradient as value_gradient,
)
from .pathwise import (
    Pathwise as Pathwise,
    discount_per_step as discount_per_step,
    discount_per_time as discount_per_time,
    every_start as every_start,
    last as last,
    late as late,
    undiscounted as undiscounted,
)
from .trajectory import LogVariance as LogVariance, PathConsistency as PathConsistency
