"""Command lines: names are those of the registries, usage errors come before JAX is loaded, settings of papers are defaults."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from experiments import names
from experiments.algorithm_registry import ALGORITHMS
from experiments.exact import config as exact, experiment as leaderboard
from experiments.exact.__main__ import main as exact_main
from experiments.pod_plan import cases, config as pod_plan
from experiments.reward_registry import OF_DIGITS, OF_IMAGES
from experiments.solver_registry import KINDS, SOLVERS
from experiments.text_to_image import config as text_to_image, experiment
from experiments.text_to_image.__main__ import main
from experiments.text_to_image.settings import PUBLISHED
from experiments.value_networks import cases as value_problems, config as value_networks
from experiments.value_networks.variants import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "algorithms": (names.AlgorithmName, ALGORITHMS),
    "rewards of digits": (names.DigitsReward, OF_DIGITS),
    "rewards of images": (names.ImageReward, OF_IMAGES),
    "solvers": (names.SolverName, SOLVERS),
    "Gaussian solvers": (names.GaussianSolver, [name for name, choice in SOLVERS.items() if choice.gaussian]),
    "kinds of solvers": (names.SolverKind, KINDS),
    "entries of the leaderboard": (exact.Entry, leaderboard.ENTRIES),
    "problems of the leaderboard": (exact.ProblemName, leaderboard.PROBLEMS),
    "planned experiments": (pod_plan.Experiment, cases.EXPERIMENTS),
    "papers": (text_to_image.PaperName, PUBLISHED),
    "problems of value networks": (value_networks.ProblemName, value_problems.PROBLEMS),
    "variants of value networks": (value_networks.VariantName, BY_NAME),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_command_line_knows_the_names_of_the_registry(what):
    known, registry = NAMES[what]
    assert list(get_args(known)) == list(registry)


COMMANDS = {
    "digits": ["--algorithm", "vrad"],
    "discretization": ["--solvers", "Milstein"],
    "exact": ["--quick", "--full"],
    "value_networks": ["--variants", "plane"],
    "random_model": ["--size", "sd16"],
    "pod_plan": ["--experiment", "mnist"],
    "solver_cost": ["--kinds", "stochastic"],
    "solvers": [],
    "benchmark": ["--batch", "4.5"],
    "benchmark_text_to_image": ["--no-such-option"],
    "text_to_image": ["--settings", "sqfd"],
    "report": [],
    "text_to_image_report": ["--help"],
}
LOADED = """
import runpy, sys
sys.argv[1:] = {args!r}
try:
    runpy.run_module("experiments.{name}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print(stop.code, *sorted({{"jax", "jaxlib", "flax", "numpy", "ctrl_diffusion"}} & set(sys.modules)))
"""


def test_every_command_is_here():
    found = {path.parent.name if path.name == "__main__.py" else path.stem for path in (ROOT / "experiments").rglob("*.py")
             if "__main__" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_usage_error_does_not_wait_for_jax(name):
    code = LOADED.format(name=name, args=COMMANDS[name])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ("0" if "--help" in COMMANDS[name] else "2"), done.stderr


def test_settings_of_a_paper_are_defaults(monkeypatch):
    """Options on either side of `--settings` change them, and they are those that the run gets."""
    runs = []
    monkeypatch.setattr(experiment, "run", runs.append)
    assert main(["--batch", "8", "--settings", "sqdf", "--out", "runs/sqdf", "--guidance", "7"]) == 0
    expected = PUBLISHED["sqdf"].settings | {"batch": 8, "out": Path("runs/sqdf"), "guidance": 7.0}
    assert {name: getattr(runs[0], name) for name in expected} == expected
    assert main([]) == 0
    assert all(getattr(runs[1], f.name) == f.default for f in dataclasses.fields(text_to_image.Config))


@pytest.mark.parametrize("args", [["--reward", "nice"], ["--reward", "aesthetic", "nice"]])
def test_a_reward_is_a_name_or_a_function(args, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(experiment, "run", runs.append)
    with pytest.raises(SystemExit):
        main(args)
    assert "MODULE:FUNCTION" in capsys.readouterr().err
    assert main(["--reward", "aesthetic", "module:function"]) == 0 and runs[0].reward == ("aesthetic", "module:function")


def test_a_selection_is_quick_or_full(capsys):
    with pytest.raises(SystemExit):
        exact_main(["--quick", "--full"])
    assert "--quick and --full are not allowed together" in capsys.readouterr().err


def test_nothing_is_said_about_a_tpu_that_is_not_there():
    """With libtpu installed, JAX looks for a TPU first, and the library would print errors about its metadata."""
    pytest.importorskip("libtpu")
    code = """
import sys
from experiments.commandline import FinishedRun, execute

def run(config):
    import jax
    print(jax.default_backend())

def defaults(options):
    import jax

sys.exit(execute(run, FinishedRun, None, "test", ["here"], defaults))
"""
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("JAX_PLATFORMS", "TPU_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() and "TPU" not in done.stderr and "libtpu" not in done.stderr
