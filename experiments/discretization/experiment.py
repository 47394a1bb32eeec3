"""The experiment of discretisation: policies of every seed, evaluated in every cell of solver, number of steps and noise level."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms import Algorithm
from ctrl_diffusion.optimum import mean_and_error
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.runs import (
    ProgressBar,
    RunDirectory,
    Samples,
    describe,
    exists_for_all,
    finetune,
    is_first,
    pretrain,
    wait_for_all,
)
from ctrl_diffusion.runs.evaluation import policy_metrics
from ctrl_diffusion.runs.files import write_arrays, write_atomic

from .. import data as datasets
from ..classifier import train_classifier
from ..distances import Target, energy_distance, make_target, noise_floor
from ..reward_registry import OF_DIGITS, RewardSettings
from ..solver_registry import as_choices
from .cells import Samplers, bandwidth_of, collect
from .checks import filled, resolve
from .config import NOT_IDENTIFYING, Config as Config
from .figures import write_figures
from .summary import METHODS, NAMES, PENALISED, summarise, table, verdict


class Policies(NamedTuple):
    """One seed: parameters by method, the reweighted law, rewards of the training chain's reference, what it took."""

    params: dict[str, Any]
    target: Target
    target_sample_size: float
    floor: float
    chain_rewards: np.ndarray
    seconds: dict[str, float]


def run(config: Config) -> dict[str, Any]:
    """The whole experiment; returns the metrics, which are also in `config.out / "metrics.json"`."""
    begin = time.perf_counter()
    config = resolve(config)
    layout = config.devices.start()
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name not in NOT_IDENTIFYING}
    directory = RunDirectory(config.out, settings)
    if (finished := directory.finished("curves.png")) is not None:
        return finished

    print(describe(layout, batch=config.batch, pretrain_batch=config.pretrain_batch, samples=filled(config.samples)))
    experiment = Experiment(config, layout)
    print(f"[1/3] pre-training and fine-tuning, {config.seeds} seeds")
    policies = [experiment.policies(seed) for seed in range(filled(config.seeds))]
    print(f"[2/3] {len(config.solvers)} solvers x {len(config.steps)} step counts x {len(config.etas)} noise levels")
    cells = []
    with ProgressBar(len(config.solvers) * len(config.etas), "matrix", "solver and eta") as bar:
        for name in config.solvers:
            for eta in config.etas:
                cells += experiment.cells(name, eta, policies)
                bar.update()
    print("[3/3] summary and figures")
    trained = config.train_solver, config.train_steps, config.train_eta
    found = summarise(cells, *trained)
    metrics = {
        "cells": cells,
        **found,
        "verdict": verdict(found, *trained),
        "noise_floor": [p.floor for p in policies],
        "target_effective_sample_size": [p.target_sample_size for p in policies],
        "budget": _budget(config, policies),
        "wall_seconds": time.perf_counter() - begin,
    }
    history = {
        method: [RunDirectory(experiment.folder(seed, method), experiment.settings).history() for seed in range(len(policies))]
        for method in METHODS[1:]
    }
    if is_first():
        write_atomic(config.out / "table.md", table(found, *trained) + "\n" + metrics["verdict"] + "\n")
        write_figures(config.out, metrics, history, [p.chain_rewards for p in policies], settings)
    directory.finish(metrics)
    print(metrics["verdict"])
    print(f"{metrics['wall_seconds']:.0f} s; see {config.out / 'curves.png'} and {config.out / 'table.md'}")
    return metrics


_STREAMS = ("pretrain", "finetune", "target", "chain", "evaluation", "network", "value")


class Experiment:
    """The parts of a run, each of them on disk once it is complete."""

    def __init__(self, config: Config, layout: Layout = ONE_DEVICE):
        self.config, self.layout, self.choices = config, layout, as_choices(config.solvers)
        self.images = datasets.digits()
        self.shape = self.images.x.shape[1:]
        self.schedule = cd.VPCosine(tau_min=0.02)
        self.bandwidth = bandwidth_of(self.images.x)
        self.settings = {
            name: v for name, v in dataclasses.asdict(config).items()
            if name not in (*NOT_IDENTIFYING, "full", "seeds", "solvers", "steps", "etas")
        }  # fmt: skip
        half = np.random.default_rng(0).permutation(len(self.images.x))[: len(self.images.x) // 2]
        assert self.images.y is not None
        classes, _ = train_classifier(jax.random.key(0), jnp.asarray(self.images.x[half]), jnp.asarray(self.images.y[half]))
        self.reward = OF_DIGITS["digit"].make(RewardSettings(classes, config.digit))
        process = cd.DiffusionProcess(self.schedule, config.train_eta)
        network = cd.ResidualMLP(self.shape, self.shape, width=config.width, depth=config.depth, rngs=nnx.Rngs(0))
        solver = self.choices[config.train_solver].solver
        self.model = cd.make_model(network, process, self.shape, grid=process.grid(config.train_steps), solver=solver)
        longest = max(*config.steps, config.optimum_steps)
        self.samplers = Samplers(self.model.sampler.control, self.schedule, self.shape, longest)
        self.algorithm = functools.cache(self._algorithm)

    def key(self, seed: int, stream: str) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), _STREAMS.index(stream))

    def folder(self, seed: int, name: str) -> Path:
        return self.config.out / f"seed-{seed}" / name

    # -- policies -------------------------------------------------------------------------------------------------------------

    def policies(self, seed: int) -> Policies:
        """Pre-train and fine-tune, or read what has been."""
        params, seconds = {}, {}
        params["reference"], seconds["reference"] = self._finished(seed, "reference", self._pretrain)
        for method in METHODS[1:]:
            train = functools.partial(self._finetune, method=method, params=params["reference"])
            params[method], seconds[method] = self._finished(seed, method, train)
        file = self.config.out / f"seed-{seed}" / "reference.npz"
        if not exists_for_all(file):
            arrays = self._references(seed, params["reference"])
            if is_first():
                write_arrays(file, arrays)
            wait_for_all("references are written")
        with np.load(file) as found:
            rewards, chain_rewards, x = found["rewards"], found["chain_rewards"], found["x"]
        optimum = cd.reweighted_optimum(rewards, self.config.kl_weight)
        floor = noise_floor(x, optimum.weights, filled(self.config.samples), 8, seed)
        size = optimum.effective_sample_size
        return Policies(params, make_target(x, optimum.weights), size, floor, chain_rewards, seconds)

    def _finished(self, seed: int, name: str, train: Callable[[int, RunDirectory], tuple[Any, float]]) -> tuple[Any, float]:
        """Parameters and seconds of a finished part; runs it if it is not."""
        folder = self.folder(seed, name)
        if not exists_for_all(folder / "result.json"):
            run = RunDirectory(folder, self.settings, use_previous_checkpoint=self.config.use_previous_checkpoint)
            print(f"seed {seed}: {NAMES[name]}")
            params, seconds = train(seed, run)
            run.close()
            params = jax.tree.map(jnp.asarray, whole(params))
            if is_first():
                cd.save(folder / "model", self.model._replace(params=params))
                write_atomic(folder / "result.json", json.dumps({"seconds": seconds}) + "\n")
            wait_for_all("a policy is written")
        found = cd.load(folder / "model", solver=self.model.sampler.solver)
        params = self.layout.put(found.params, self.layout.replicated)
        return params, json.loads((folder / "result.json").read_text())["seconds"]

    def _pretrain(self, seed: int, run: RunDirectory) -> tuple[Any, float]:
        config = self.config
        rngs = nnx.Rngs(self.key(seed, "network"))
        network = cd.ResidualMLP(self.shape, self.shape, width=config.width, depth=config.depth, rngs=rngs)
        fresh = self.model._replace(params=cd.score_control(network, self.model.process, cd.V)[1])
        model, seconds = pretrain(
            run, fresh, jnp.asarray(self.images.x), self.key(seed, "pretrain"), steps=config.pretrain_steps,
            batch=config.pretrain_batch, learning_rate=config.pretrain_learning_rate, layout=self.layout,
        )  # fmt: skip
        return model.params, seconds

    def _algorithm(self, method: str) -> tuple[Algorithm, Callable[[int], tuple]]:
        """A method, compiled once for all seeds, and what a seed's state starts with besides the policy."""
        config, sampler = self.config, self.model.sampler
        updates = config.epochs * config.minibatches
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, updates, max(2, filled(config.iterations)) * updates, 0.1 * config.learning_rate
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        training = cd.Training(
            optimizer, config.batch, config.epochs, config.minibatches, optax.adam(config.value_learning_rate),
            layout=self.layout,
        )  # fmt: skip
        objective = cd.Objective(sampler, self.reward, 0.0 if method == "ddpo" else config.kl_weight)
        if method != "score_as_action":
            preset = {"ddpo": cd.ddpo, "ddpo_kl": cd.dpok}[method]
            return preset(objective, training, clip=config.clip), lambda seed: ()

        def value_of(seed: int):
            rngs = nnx.Rngs(self.key(seed, "value"))
            return cd.value_network(cd.ResidualMLP(self.shape, (), width=config.width // 2, depth=2, rngs=rngs))

        value = cd.StructuredValue(value_of(0)[0], sampler.process.t0, sampler.process.t1)
        algorithm = cd.score_as_action(objective, value, training, clip=config.clip)
        return algorithm, lambda seed: (value_of(seed)[1],)

    def _finetune(self, seed: int, run: RunDirectory, *, method: str, params: Any) -> tuple[Any, float]:
        config, (algorithm, extra) = self.config, self.algorithm(method)
        state, progress = finetune(
            run, algorithm, algorithm.init(params, *extra(seed)), self.key(seed, "finetune"), iterations=filled(config.iterations),
            evaluate=lambda params: {}, evaluate_every=filled(config.iterations), checkpoint_every=10, kl_budget=None,
        )  # fmt: skip
        return state.params, progress.seconds

    def _references(self, seed: int, params: Any) -> dict[str, np.ndarray]:
        """The fine chain whose reweighted law is the target, and rewards of the training chain."""
        config = self.config

        def draw(solver, eta, steps, stream, n):
            chain, grid = self.samplers.draw_chain(solver, eta, with_kl=False), self.samplers.process(eta).grid(steps)
            x, _ = collect(chain, params, params, grid, self.key(seed, stream), n, filled(config.samples), self.layout)
            return x, self._rewards(x)

        x, rewards = draw(cd.solvers.ExponentialEuler(), 1.0, config.optimum_steps, "target", config.optimum_samples)
        solver = self.choices[config.train_solver].solver
        _, chain = draw(solver, config.train_eta, config.train_steps, "chain", config.reference_samples)
        return {"x": x, "rewards": rewards, "chain_rewards": chain}

    def _rewards(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.reward.fn(jnp.asarray(x)))

    # -- cells ----------------------------------------------------------------------------------------------------------------

    def cells(self, name: str, eta: float, policies: list[Policies]) -> list[dict[str, Any]]:
        """All step counts, seeds and methods at one solver and noise level, or what is on disk of them."""
        folder = self.config.out / "cells"
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}-eta-{eta:g}.json"
        if not exists_for_all(file):
            choice = self.choices[name]
            gaussian = choice.gaussian and eta > 0
            draw = (self.samplers.draw_chain if gaussian else self.samplers.draw)(choice.solver, eta)
            plain = self.samplers.draw_chain(choice.solver, eta, with_kl=False) if gaussian else None
            rows = [
                {"seed": seed, "method": method, "solver": name, "steps": steps, "eta": eta}
                | {"network_evaluations": steps * choice.evaluations} | row
                for steps in self.config.steps
                for seed, policy in enumerate(policies)
                for method, row in self._cell(seed, policy, draw, plain, eta, steps).items()
            ]  # fmt: skip
            if is_first():
                write_atomic(file, json.dumps(rows, indent=1, allow_nan=False) + "\n")
            wait_for_all("cells are written")
        return json.loads(file.read_text())

    def _cell(self, seed: int, policy: Policies, draw, plain, eta: float, steps: int) -> dict[str, dict[str, Any]]:
        """One row per method. `plain` samples the reference without path KL, where there is a path KL."""
        config, process = self.config, self.samplers.process(eta)
        grid, reference = process.grid(steps), policy.params["reference"]
        optimum, reference_reward = None, None
        if plain is not None:
            x, _ = collect(
                plain, reference, reference, grid, self.key(seed, "chain"), config.reference_samples, filled(config.samples),
                self.layout,
            )  # fmt: skip
            rewards = self._rewards(x)
            reference_reward = mean_and_error(rewards)
            optimum = cd.reweighted_optimum(rewards, config.kl_weight, is_bound=not cd.is_memoryless(process))
        rows = {}
        for method in METHODS:
            key, n = self.key(seed, "evaluation"), filled(config.samples)
            x, kl = collect(draw, policy.params[method], reference, grid, key, n, n, self.layout)
            if not np.isfinite(x).all():
                raise FloatingPointError(
                    f"{NAMES[method]} of seed {seed} diverges with {steps} steps at eta={eta:g}: leave that solver or number of "
                    "steps out."
                )
            samples = Samples(x, self._rewards(x), kl)
            penalised = optimum if method in PENALISED else None
            row = policy_metrics(samples, penalised, reference_reward or mean_and_error(samples.rewards), config.kl_weight)
            distance = energy_distance(x, policy.target)
            row |= {"energy_distance": distance.mean, "energy_distance_se": distance.se}
            row |= {"diversity": cd.diversity.vendi_score(x[:256], self.bandwidth)}
            row |= {
                "optimum": optimum and optimum.objective.mean,
                "optimum_se": optimum and optimum.objective.se,
                "optimum_is_bound": optimum and optimum.is_bound,
                "effective_sample_size": optimum and optimum.effective_sample_size,
            }
            rows[method] = row
        return rows


def _budget(config: Config, policies: list[Policies]) -> dict[str, Any]:
    """What fine-tuning took, per seed: the same for all methods, but for the value network and the seconds."""
    paths = filled(config.iterations) * config.batch
    pairs = paths * config.train_steps
    return {
        "paths": paths,
        "policy_updates": filled(config.iterations) * config.epochs * config.minibatches,
        "network_evaluations": 3 * pairs,  # the paths, then old and reference actions
        "network_gradient_evaluations": config.epochs * pairs,
        "value_evaluations": {m: pairs if m == "score_as_action" else 0 for m in METHODS[1:]},
        "value_gradient_evaluations": {m: config.epochs * pairs if m == "score_as_action" else 0 for m in METHODS[1:]},
        "reward_evaluations": {m: paths + (pairs if m == "score_as_action" else 0) for m in METHODS[1:]},
        "seconds": {m: float(np.mean([p.seconds[m] for p in policies])) for m in METHODS},
    }
