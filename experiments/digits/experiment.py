"""The experiment of the digits: pre-training, the optimum, fine-tuning, evaluation and a report."""

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms import AdaptiveKL, State
from ctrl_diffusion.optimum import Optimum, mean_and_error
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.rewards import as_reward, try_reward
from ctrl_diffusion.runs import (
    Evaluator,
    Progress,
    RunDirectory,
    Samples,
    TensorBoard,
    WeightsAndBiases,
    describe,
    finetune,
    is_first,
    pretrain,
)
from ctrl_diffusion.runs.evaluation import diversities, optimum_metrics, policy_metrics
from ctrl_diffusion.runs.files import write_arrays

from .. import data as datasets
from ..algorithm_registry import AlgorithmSettings, choose, make_algorithm, require_gradient, value_for
from ..classifier import LogProbabilities, train_classifier
from ..reward_registry import OF_DIGITS, RewardSettings
from .checks import Described, check, described
from .config import Config as Config
from .report import write_report


def run(
    config: Config,
    *,
    reward: cd.rewards.Reward | Callable[[np.ndarray], Any] | None = None,
    data: np.ndarray | None = None,
    network: nnx.Module | None = None,
) -> dict[str, Any]:
    """The whole experiment; returns the metrics, which are also in `config.out / "metrics.json"`.

    Args:
        config: the settings.
        reward: your own reward, instead of `config.reward`: a function of a numpy batch `[b, h, w, c]` to `b` numbers, or
            `ctrl_diffusion.differentiable(f)` for a JAX function. Set `config.kl_weight` with it.
        data: your own images `[n, h, w]` or `[n, h, w, c]` in [-1, 1], instead of the digits.
        network: your own flax NNX module `network(x [b, h, w, c], t [b], cond) -> [b, h, w, c]` (v-prediction).
    """
    begin = time.perf_counter()
    layout = config.devices.start()
    images = datasets.digits() if data is None else datasets.from_array(data)
    kl_weight = check(config, reward, images)
    keys = {name: jax.random.fold_in(jax.random.key(config.seed), i) for i, name in enumerate(_STREAMS)}
    model = _model(config, network, images.x.shape[1:])
    has_gradient = (OF_DIGITS[config.reward] if reward is None else as_reward(reward)).differentiable
    stand_in = cd.rewards.Reward(config.reward, len, has_gradient)
    _algorithm(config, model.sampler, stand_in, kl_weight, layout)  # refuses what does not fit
    if reward is not None:
        try_reward(as_reward(reward), jnp.asarray(images.x[:2]))

    directory = _directory(config, described(config, kl_weight, reward, data, model.network))
    if (finished := directory.finished("report.html", write_report)) is not None:
        return finished

    print(describe(layout, batch=config.batch, pretrain_batch=config.pretrain_batch))
    print(f"[1/4] classifiers and pre-training ({len(images.x)} images, {_count(model.params):,} parameters)")
    log_probabilities, held_out_classifier = _classifiers(keys["classifier"], images)
    chosen = (
        OF_DIGITS[config.reward].make(RewardSettings(log_probabilities, config.digit)) if reward is None else as_reward(reward)
    )
    model, pretrain_seconds = pretrain(
        directory, model, jnp.asarray(images.x), keys["pretrain"], steps=config.pretrain_steps, batch=config.pretrain_batch,
        learning_rate=config.pretrain_learning_rate, layout=layout,
    )  # fmt: skip
    _save(config.out / "reference", model, model.params)
    print(f"[2/4] the optimum, from {config.reference_samples} reference samples")
    scales, chunk = model.sampler.chain_scales() if config.eta > 0 else None, min(1024, config.evaluation_samples // 4)
    evaluator = Evaluator(model.sampler, chosen, model.params, scales, chunk, layout)
    reference = evaluator.reference_samples(keys["reference"], config.reference_samples, file=config.out / "reference.npz")
    reference_reward = mean_and_error(reference.rewards)
    optimum_at = partial(_optimum, reference, model.process)
    optimum_at(kl_weight, warn=True)
    held_out = _held_out(held_out_classifier, None if reward is not None or config.reward != "digit" else config.digit)

    print(f"[3/4] fine-tuning for {chosen.name!r} at {kl_weight:g} per nat of path KL")
    algorithm, value_params = _algorithm(config, model.sampler, chosen, kl_weight, layout)

    def temperature(state: State) -> float:
        return kl_weight if config.kl_target is None else float(state.kl_weight)

    def evaluate_now(state: State) -> dict[str, Any]:
        found = evaluator.samples(_result(config, state), keys["evaluation"], config.evaluation_samples // 4)
        numbers = policy_metrics(found, optimum_at(temperature(state)), reference_reward, temperature(state))
        logged = {name if name.startswith("relative") else f"evaluation_{name}": v for name, v in numbers.items()}
        return logged | {"samples": found.x[:64]}

    state, progress = finetune(
        directory, algorithm, algorithm.init(model.params, value_params), keys["finetune"], iterations=config.iterations,
        evaluate=evaluate_now, evaluate_every=config.evaluate_every,
        observe=lambda info: {} if held_out is None else {"held_out_reward": held_out(info.samples)},
        checkpoint_every=config.checkpoint_every, kl_budget=config.kl_budget,
    )  # fmt: skip

    print("[4/4] evaluation and report")
    tuned, kl_weight = _result(config, state), temperature(state)
    _save(config.out / "model", model, tuned)
    final = evaluator.samples(tuned, keys["evaluation"], config.evaluation_samples)
    before = evaluator.reference_samples(keys["evaluation"], 64)
    optimum = optimum_at(kl_weight)
    at_optimum, weights = _at_optimum(reference, optimum, config.seed)
    if is_first():
        sets = {"before": before, "after": final, "optimum": at_optimum}
        histograms = {"before": (reference.x, None), "after": (final.x, None), "optimum": (reference.x, weights)}
        write_arrays(config.out / "samples.npz", _for_figures(held_out_classifier, sets, histograms))
    metrics = policy_metrics(final, optimum, reference_reward, kl_weight) | _counts(progress, algorithm)
    metrics |= optimum_metrics(optimum, reference_reward, config.reference_samples)
    metrics |= diversities(images.x, reference.x, final.x, at_optimum.x)
    metrics |= {
        "held_out_reward": held_out and held_out(jnp.asarray(final.x)),
        "held_out_reward_reference": held_out and held_out(jnp.asarray(reference.x)),
        "pretrain_seconds": pretrain_seconds,
        "finetune_seconds": progress.seconds,
        "kl_weight": kl_weight,
        "pretrain_gradient_evaluations": config.pretrain_steps * config.pretrain_batch,
        "peak_rss_bytes": _peak_rss(),
        "wall_seconds": time.perf_counter() - begin,
    }
    directory.close()
    directory.finish(metrics)
    if is_first():
        _print_summary(metrics, write_report(config.out))
    return metrics


def _directory(config: Config, settings: Described) -> RunDirectory:
    """The folder of the run."""
    loggers = [TensorBoard(), *([] if config.wandb is None else [WeightsAndBiases(config.wandb)])]
    return RunDirectory(
        config.out, settings.identity, about=settings.about, evaluation=settings.evaluation, iterations=config.iterations,
        use_previous_checkpoint=config.use_previous_checkpoint, loggers=loggers,
    )  # fmt: skip


def _model(config: Config, network: nnx.Module | None, shape: tuple[int, ...]) -> cd.DiffusionModel:
    """The model before it is trained, with its own network unless one is given."""
    dtype = None if config.precision == "float32" else config.precision
    network = network or cd.ResidualMLP(
        shape, shape, width=config.width, depth=config.depth, dtype=dtype, rngs=nnx.Rngs(config.seed)
    )
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02), config.eta)
    return cd.make_model(network, process, shape, grid=process.grid(config.steps))


def _counts(progress: Progress, algorithm: cd.algorithms.Algorithm) -> dict[str, Any]:
    """What fine-tuning did."""
    calls = algorithm.calls
    return {
        "iterations": progress.iterations,
        "stop_reason": progress.stop_reason,
        "network_evaluations": progress.iterations * calls.network,
        "network_gradient_evaluations": progress.iterations * calls.gradient,
        "reward_evaluations": progress.iterations * calls.reward,
    }


def _optimum(reference: Samples, process: cd.DiffusionProcess, kl_weight: float, warn: bool = False) -> Optimum | None:
    """The optimum at this temperature from samples of the reference; there is none without a KL penalty."""
    if not kl_weight:
        return None
    optimum = cd.reweighted_optimum(reference.rewards, kl_weight, is_bound=not cd.is_memoryless(process))
    if warn and optimum.effective_sample_size < 100:
        print(
            f"warning: the optimum rests on {optimum.effective_sample_size:.0f} effective samples: raise --reference-samples "
            "or --kl-weight."
        )
    return optimum


def _at_optimum(reference: Samples, optimum: Optimum | None, seed: int) -> tuple[Samples, np.ndarray]:
    """512 samples of the reference, drawn by their weights at the optimum, and these weights (all alike without an optimum)."""
    weights = np.full(len(reference.x), 1 / len(reference.x)) if optimum is None else optimum.weights
    rows = np.random.default_rng(seed).choice(len(reference.x), 512, p=weights)
    return Samples(reference.x[rows], reference.rewards[rows], None), weights


def _for_figures(
    classifier: LogProbabilities | None,
    sets: dict[str, Samples],
    histograms: dict[str, tuple[np.ndarray, np.ndarray | None]],
) -> dict[str, np.ndarray]:
    """The first 64 images of each set with their rewards, and what a classifier makes of (weighted) images."""
    arrays = {name: samples.x[:64] for name, samples in sets.items()}
    arrays |= {f"rewards_{name}": samples.rewards[:64] for name, samples in sets.items()}
    if classifier is not None:
        arrays |= {f"histogram_{name}": _histogram(classifier, *images) for name, images in histograms.items()}
    return arrays


def _result(config: Config, state: Any) -> Any:
    """The parameters that are evaluated and saved."""
    return state.params if config.average is None else state.average


def _save(folder: Path, model: cd.DiffusionModel, params: Any) -> None:
    """The model with these parameters, written by the first process."""
    params = jax.tree.map(jnp.asarray, whole(params))
    if is_first():
        cd.save(folder, model._replace(params=params))


def _algorithm(
    config: Config, sampler: cd.Sampler, reward: cd.rewards.Reward, kl_weight: float, layout: Layout = ONE_DEVICE
) -> tuple[cd.algorithms.Algorithm, Any]:
    """The algorithm by its name, and initial parameters of its value."""
    require_gradient(config.algorithm, reward)
    exploration = None
    if config.exploration == "action":
        strength, substeps = config.exploration_strength, config.exploration_substeps
        exploration = cd.exploration.ActionNoise(0.5 if strength is None else strength, 1 if substeps is None else substeps)
    objective = cd.Objective(sampler, reward, kl_weight, exploration=exploration)
    network = cd.ResidualMLP(sampler.shape, (), width=config.width // 2, depth=2, rngs=nnx.Rngs(config.seed + 1))
    value_fn, value_params = cd.value_network(network)
    updates = config.epochs * config.minibatches
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, updates, max(2, config.iterations) * updates, 0.1 * config.learning_rate
    )
    training = cd.Training(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), config.batch, config.epochs, config.minibatches,
        optax.adam(config.value_learning_rate), layout=layout, accumulation=config.accumulation, average=config.average,
        stratified=config.stratified, scan_minibatches=config.scan_minibatches,
        kl_target=None if config.kl_target is None else AdaptiveKL(config.kl_target),
    )  # fmt: skip
    choice, value = choose(config.algorithm), value_for(reward, value_fn, sampler.process)
    algorithm = make_algorithm(config.algorithm, AlgorithmSettings(objective, value, training), config)
    return algorithm, value_params if choice.learns_value else ()


_STREAMS = ("classifier", "pretrain", "reference", "finetune", "evaluation")


def _classifiers(key: jax.Array, images: datasets.Images) -> tuple[LogProbabilities | None, LogProbabilities | None]:
    """The reward's classifier and the held-out one, from disjoint halves of the labelled data (`None` without labels)."""
    if images.y is None:
        return None, None
    order = np.random.default_rng(0).permutation(len(images.x))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    both = [
        train_classifier(jax.random.fold_in(key, i), jnp.asarray(images.x[h]), jnp.asarray(images.y[h]))[0]
        for i, h in enumerate(halves)
    ]
    return both[0], both[1]


def _held_out(classifier: LogProbabilities | None, digit: int | None) -> Callable[[jax.Array], float] | None:
    """Mean log-probability under the classifier of the digit asked for, or of the likeliest class ("is it still a digit?")."""
    if classifier is None:
        return None

    @jax.jit
    def score(x):
        logp = classifier(x)
        return jnp.mean(jnp.max(logp, axis=-1) if digit is None else logp[:, digit])

    return lambda x: float(score(x))


def _histogram(classifier: LogProbabilities, x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    classes = np.asarray(jnp.argmax(classifier(jnp.asarray(x)), axis=-1))
    counts = np.bincount(classes, weights, minlength=10)
    return counts / counts.sum()


def _count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _peak_rss() -> int:
    """Peak resident memory of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _print_summary(metrics: dict[str, Any], report: Path) -> None:
    line = f"reward {metrics['reward_reference']:.3f} -> {metrics['reward']:.3f} +- {metrics['reward_se']:.3f}"
    if metrics["path_kl"] is not None:
        line += f", path KL {metrics['path_kl']:.3f} nats"
    if metrics["relative_gap"] is not None:
        line += f", relative gap {metrics['relative_gap']:.3f} +- {metrics['relative_gap_se']:.3f}"
    print(f"{line}; {metrics['wall_seconds']:.0f} s. Report: {report}")
