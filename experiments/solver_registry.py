"""The solvers that the command lines know by name: those that any sampler may be given, and those that are compared, by their use."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax as dfx
import optimistix as optx

from ctrl_diffusion import solvers as cds
from ctrl_diffusion.predictions import EPSILON, X0, Prediction

from .commandline import require_known

ODE, SDE, ADAPTIVE, IMPLICIT = KINDS = ("ODE", "SDE", "adaptive", "implicit")
Make = Callable[[Any, int], dfx.AbstractSolver]  # make(path, steps)


class SolverCase(NamedTuple):
    """A solver in one of its uses.

    Attributes:
        name: unique within the kind.
        kind: "ODE" and "SDE" on a fixed grid, the latter at eta = 1 with keyed noise; "adaptive" steps, on a Brownian tree where
            eta > 0; "implicit" ODE solvers on a fixed grid.
        make: the solver for a noise path (None without noise) and a number of steps.
        order: declared: deterministic order for ODEs, weak order for SDEs, strong order for adaptive SDEs.
        stages: network evaluations a step; 0 where it depends on the data.
        draws: standard normals per step and state entry.
        frozen, eta: of the process.
        perturbed: whether the order is promised from any law at the start, or from the marginals of the process alone.
        memory: past controls that a step mixes with the new one.
        corrects: whether a step first corrects the state that it starts from.
        noise_first: whether the network sees the step's noise in its first stage.
        extra: network evaluations before the first step, by methods whose last stage is the first of the next step.
    """

    name: str
    kind: str
    make: Make
    order: float
    stages: int
    draws: int = 0
    frozen: Prediction = X0
    eta: float = 0.0
    perturbed: bool = True
    memory: int = 0
    corrects: bool = False
    noise_first: bool = False
    extra: int = 0


def _case(kind, solver, stages, draws=0, frozen=X0, name="", order=None, memory=0) -> SolverCase:
    if order is None:
        order = solver.weak_order if kind == SDE else solver.order(None)
    name, corrects = name or type(solver).__name__, isinstance(solver, cds.UniPC)
    return SolverCase(
        name,
        kind,
        lambda path, steps: solver,
        order,
        stages,
        draws,
        frozen,
        float(kind == SDE),
        memory=memory,
        corrects=corrects,
    )


def _churn(path, steps) -> cds.EDMHeun:
    return cds.EDMHeun(s_churn=2.0, steps=steps, path=path)


def _chord(cls) -> dfx.AbstractSolver:
    return cls(root_finder=optx.Chord(rtol=1e-10, atol=1e-10))


OWN_SDE = [
    _case(SDE, cds.ExponentialEuler(), 1, 1),
    _case(SDE, cds.DDIM(), 1, 1),
    _case(SDE, cds.DPMSolverPP2M(), 1, 1, memory=1),
    _case(SDE, cds.DPMSolverPP3M(), 1, 1, memory=2),
    _case(SDE, cds.ExponentialAdamsBashforth(2), 1, 1, name="ExponentialAdamsBashforth(2)", memory=1),
    _case(SDE, cds.ExponentialAdamsBashforth(4), 1, 1, name="ExponentialAdamsBashforth(4)", memory=3),
    _case(SDE, cds.ERSDE(3), 1, 1, name="ERSDE(3)", memory=2),
    _case(SDE, cds.UniPC(2), 1, 1, name="UniPC(2)", memory=2),
    _case(SDE, cds.UniPC(3), 1, 1, name="UniPC(3)", memory=3),
    _case(SDE, cds.DPMSolver2S(), 2, 2),
    _case(SDE, cds.ExponentialHeun(), 2, 1),
    _case(SDE, cds.ExponentialSRA(), 2, 2),
    SolverCase("EDMHeun(churn)", SDE, _churn, 2, 2, 1, EPSILON, 0.0, perturbed=False, noise_first=True),
]
# weak orders for additive noise, which diffrax does not declare
DIFFRAX_SDE = [
    _case(SDE, dfx.Euler(), 1, 1, order=1, name="diffrax.Euler"),
    _case(SDE, dfx.EulerHeun(), 1, 1, order=1, name="diffrax.EulerHeun"),
    _case(SDE, dfx.Heun(), 2, 1, order=2, name="diffrax.Heun"),
    _case(SDE, dfx.SEA(), 1, 2, order=1, name="diffrax.SEA")._replace(noise_first=True),
    _case(SDE, dfx.SRA1(), 2, 2, order=2, name="diffrax.SRA1"),
    _case(SDE, dfx.ShARK(), 2, 2, order=2, name="diffrax.ShARK")._replace(noise_first=True),
    _case(SDE, dfx.SPaRK(), 3, 2, order=2, name="diffrax.SPaRK"),
    _case(SDE, dfx.SlowRK(), 2, 2, order=2, name="diffrax.SlowRK"),
]
OWN_ODE = [
    _case(ODE, cds.ExponentialEuler(), 1),
    _case(ODE, cds.DDIM(), 1),
    _case(ODE, cds.DPMSolverPP2M(), 1, memory=1),
    _case(ODE, cds.DPMSolverPP3M(), 1, memory=2),
    _case(ODE, cds.DPMSolverPP3M(curvature=0.5), 1, name="DPMSolverPP3M(curvature=0.5)", memory=2),
    _case(ODE, cds.ExponentialAdamsBashforth(3), 1, frozen=EPSILON, name="ExponentialAdamsBashforth(3)", memory=2),
    _case(ODE, cds.ExponentialAdamsBashforth(4), 1, name="ExponentialAdamsBashforth(4)", memory=3),
    _case(ODE, cds.ERSDE(3), 1, name="ERSDE(3)", memory=2),
    _case(ODE, cds.UniPC(2), 1, name="UniPC(2)", memory=2),
    _case(ODE, cds.UniPC(3), 1, name="UniPC(3)", memory=3),
    _case(ODE, cds.DPMSolver2S(), 2),
    _case(ODE, cds.ExponentialHeun(), 2, frozen=EPSILON),
    _case(ODE, cds.EDMHeun(), 2, frozen=EPSILON),
    _case(ODE, cds.ExponentialSRA(), 2),
    _case(ODE, cds.DPMSolver3S(), 3),
]
DIFFRAX_ODE = [
    _case(ODE, dfx.Euler(), 1, name="diffrax.Euler"),
    _case(ODE, dfx.Heun(), 2, name="diffrax.Heun"),
    _case(ODE, dfx.Midpoint(), 2, name="diffrax.Midpoint"),
    _case(ODE, dfx.Ralston(), 2, name="diffrax.Ralston"),
    _case(ODE, dfx.Tsit5(), 6, name="diffrax.Tsit5")._replace(extra=1),
    _case(ODE, dfx.Dopri5(), 6, name="diffrax.Dopri5")._replace(extra=1),
    _case(ODE, dfx.Dopri8(), 13, name="diffrax.Dopri8")._replace(extra=1),
]
ADAPTIVE_CASES = [
    _case(ADAPTIVE, cds.ExponentialHeun(), 0, frozen=EPSILON),
    _case(ADAPTIVE, cds.DPMSolver2S(), 0),
    _case(ADAPTIVE, cds.DPMSolver3S(), 0),
    _case(ADAPTIVE, dfx.Tsit5(), 0, name="diffrax.Tsit5"),
    _case(ADAPTIVE, dfx.Dopri8(), 0, name="diffrax.Dopri8"),
    _case(ADAPTIVE, cds.ExponentialSRA(), 0, 2, order=1.5, name="ExponentialSRA (tree)")._replace(eta=1.0),
]
IMPLICIT_CASES = [
    _case(IMPLICIT, _chord(dfx.Kvaerno3), 0, name="diffrax.Kvaerno3"),
    _case(IMPLICIT, _chord(dfx.Kvaerno5), 0, name="diffrax.Kvaerno5"),
]
CASES = [*OWN_SDE, *DIFFRAX_SDE, *OWN_ODE, *DIFFRAX_ODE, *ADAPTIVE_CASES, *IMPLICIT_CASES]


def chosen(only: tuple[str, ...], kinds: tuple[str, ...] = ()) -> list[SolverCase]:
    """The cases of these kinds (empty: all) whose name contains one of `only` (empty: all); `ValueError` where there is none."""
    found = [c for c in CASES if (not kinds or c.kind in kinds) and (not only or any(part in c.name for part in only))]
    if not found:
        raise ValueError(
            f"only={' '.join(only)} names no solver. There are: {', '.join(dict.fromkeys(c.name for c in CASES))}."
        )
    return found


class SolverChoice(NamedTuple):
    """A solver, its network evaluations per step, and whether a noisy step of it is one Gaussian transition."""

    solver: dfx.AbstractSolver
    evaluations: int
    gaussian: bool = False


SOLVERS: dict[str, SolverChoice] = {
    "ExponentialEuler": SolverChoice(cds.ExponentialEuler(), 1, gaussian=True),
    "DDIM": SolverChoice(cds.DDIM(), 1, gaussian=True),
    "Euler": SolverChoice(dfx.Euler(), 1, gaussian=True),
    "DPMSolverPP2M": SolverChoice(cds.DPMSolverPP2M(), 1),
    "DPMSolverPP3M": SolverChoice(cds.DPMSolverPP3M(), 1),
    "UniPC": SolverChoice(cds.UniPC(2), 1),
    "ERSDE": SolverChoice(cds.ERSDE(2), 1),
    "ExponentialAdamsBashforth": SolverChoice(cds.ExponentialAdamsBashforth(2), 1),
    "DPMSolver2S": SolverChoice(cds.DPMSolver2S(), 2),
    "ExponentialHeun": SolverChoice(cds.ExponentialHeun(), 2),
    "Heun": SolverChoice(dfx.Heun(), 2),
}


def as_choices(names: Sequence[str]) -> dict[str, SolverChoice]:
    """The solvers of these names; `ValueError` for unknown ones."""
    require_known("solvers", names, SOLVERS)
    return {name: SOLVERS[name] for name in names}
