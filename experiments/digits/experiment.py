"""Pre-train a small diffusion model on real handwritten digits, fine-tune it for a reward, and report what happened.

    python -m experiments.digits --out runs/digits

The network is unconditional on purpose: a class-conditional model could satisfy the default reward without any fine-tuning.
The exact optimum is known by reweighting reference samples, so the run ends with an optimality gap, not only a reward.
Running the same command again resumes the run, or says that it is finished.
"""

import dataclasses
import difflib
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.optimum import mean_and_error
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.rewards import as_reward

from .. import data as datasets
from ..algorithm_registry import Settings, choose, require_gradient, value_for
from ..classifier import LogProbabilities, train_classifier
from ..commandline import execute
from ..devices import Devices, describe, is_first
from ..evaluation import Evaluator, Samples, diversities, optimum_metrics, summary
from ..files import write_arrays
from ..reward_registry import OF_DIGITS, Settings as RewardSettings
from ..rundir import RunDirectory
from ..training import finetune, pretrain
from .report import write_report


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Times are control time: 0 is noise, 1 is data. Training and sampling derive from `seed`."""

    out: Path = Path("runs/digits")
    """Folder for models, logs, figures and the report."""
    reward: str = "digit"
    """What to fine-tune for: digit (log-probability of one digit under a frozen classifier, nats), ink (inked pixels),
    holes (count; black box), bytes (minus compressed size; black box)."""
    digit: int = 3
    """Which digit the reward "digit" asks for, 0 to 9."""
    algorithm: str = "score_as_action"
    """How to fine-tune: score_as_action (PPO), score_as_action_trpo, score_as_action_published, ddpo, dpok, flow_grpo, vard,
    soft_vard, sqdf, draft, draft_1, alignprop, refl, adjoint_matching, rwr, vidd, log_variance, nabla_db, path_consistency."""
    kl_weight: float | None = None
    """Temperature lambda: price of path KL in reward units per nat. Default: the reward's own (digit 1, ink 1.5, holes 0.25,
    bytes 1.5), and 0 for ddpo, draft, draft_1, alignprop, refl, which are published without a price."""
    eta: float = 1.0
    """Noise level of the sampler: 1 is the reverse SDE, 0 the probability-flow ODE (needs --exploration action)."""
    steps: int = 24
    """Control intervals between noise and data."""
    exploration: Literal["brownian", "action"] = "brownian"
    """Explore by the SDE's own noise, or by action noise held over each control interval."""
    exploration_strength: float = 0.5
    """Action noise in units of 1/g (only with --exploration action)."""
    exploration_substeps: int = 1
    """Solver steps per control interval while exploring (only with --exploration action)."""
    pretrain_steps: int = 3000
    """Optimiser steps of pre-training."""
    pretrain_batch: int = 256
    """Images per pre-training step."""
    pretrain_learning_rate: float = 2e-3
    """Peak Adam learning rate of pre-training (cosine decay)."""
    width: int = 256
    """Features of the residual network."""
    depth: int = 3
    """Residual blocks of the network."""
    iterations: int = 90
    """Fine-tuning iterations: sample, evaluate, update."""
    batch: int = 512
    """Paths per iteration."""
    epochs: int = 2
    """Passes over the paths of an iteration."""
    minibatches: int = 8
    """Updates per pass; must divide batch * steps."""
    learning_rate: float = 2e-4
    """Peak Adam learning rate of the policy (warm-up over the first iteration, cosine decay to a tenth)."""
    value_learning_rate: float = 2e-3
    """Adam learning rate of the value network."""
    clip: float = 0.2
    """The likelihood ratio of a step is clipped to 1 +- clip (inf: not clipped)."""
    kl_radius: float = 0.05
    """Path KL of an update, nats (only with --algorithm score_as_action_trpo)."""
    horizon: float = 0.0
    """Decay time of the advantages, control time (0: single value increments, inf: Monte Carlo returns)."""
    kl_budget: float | None = None
    """Stop when the samples' path KL to the pre-trained model exceeds this many nats."""
    reference_samples: int = 16384
    """Reference samples that the optimum is estimated from."""
    evaluation_samples: int = 4096
    """Samples of the final evaluation (a quarter of them during the run)."""
    evaluate_every: int = 10
    """Iterations between evaluations."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    accumulation: int = 1
    """Parts that the rows of an update are worked through in, one after the other: less memory, the same update."""
    stratified: bool = False
    """Deal each group of consecutive rows out to the minibatches instead of shuffling all: nothing moves between devices."""
    scan_minibatches: bool = False
    """Make a pass over the minibatches one program: faster updates on CPUs."""
    average: float | None = None
    """Decay per update of a running average of the parameters, which is then evaluated and saved (as 0.99; default: none)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's matrix products; states, likelihoods, KL and parameters are float32."""
    use_previous_checkpoint: bool = False
    """If the newest checkpoint cannot be read, delete it and resume from the one before."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well (needs the package wandb)."""
    devices: Devices = Devices()
    """Devices that share the run."""


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.digits", args)


def run(
    config: Config,
    *,
    reward: cd.Reward | Callable[[np.ndarray], Any] | None = None,
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
    shape = images.x.shape[1:]
    kl_weight = _check(config, reward, images)
    keys = {name: jax.random.fold_in(jax.random.key(config.seed), i) for i, name in enumerate(_STREAMS)}
    dtype = None if config.precision == "float32" else config.precision
    network = network or cd.ResidualMLP(
        shape, shape, width=config.width, depth=config.depth, dtype=dtype, rngs=nnx.Rngs(config.seed)
    )
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02), config.eta)
    model = cd.make_model(network, process, shape, grid=process.grid(config.steps))
    has_gradient = as_reward(reward).differentiable if reward is not None else OF_DIGITS[config.reward].differentiable
    _algorithm(
        config, model.sampler, cd.Reward(config.reward, len, has_gradient), kl_weight, layout
    )  # refuses what does not fit

    settings = _settings(config, kl_weight, reward, data, network)
    directory = RunDirectory(config.out, settings, config.use_previous_checkpoint, config.wandb)
    if (finished := directory.finished("report.html", write_report)) is not None:
        return finished

    print(describe(layout, batch=config.batch, pretrain_batch=config.pretrain_batch))
    print(f"[1/4] classifiers and pre-training ({len(images.x)} images, {_count(model.params):,} parameters)")
    log_probabilities, judge = _classifiers(keys["classifier"], images)
    chosen = (
        as_reward(reward)
        if reward is not None
        else OF_DIGITS[config.reward].make(RewardSettings(log_probabilities, config.digit))
    )
    x = jnp.asarray(images.x)
    model, pretrain_seconds = pretrain(
        directory, model, x, keys["pretrain"], steps=config.pretrain_steps, batch=config.pretrain_batch,
        learning_rate=config.pretrain_learning_rate, layout=layout,
    )  # fmt: skip
    _save(config.out / "reference", model, model.params)

    print(f"[2/4] the optimum, from {config.reference_samples} reference samples")
    scales = model.sampler.chain_scales() if config.eta > 0 else None
    chunk = min(1024, config.evaluation_samples // 4)
    evaluator = Evaluator(model.sampler, chosen, model.params, scales, chunk, layout)
    reference = evaluator.reference_samples(keys["reference"], config.reference_samples)
    reference_reward = mean_and_error(reference.rewards)
    optimum = cd.reweighted_optimum(reference.rewards, kl_weight, is_bound=not cd.is_memoryless(process)) if kl_weight else None
    if optimum is not None and optimum.effective_sample_size < 100:
        print(
            f"warning: the optimum rests on {optimum.effective_sample_size:.0f} effective samples: raise --reference-samples "
            "or --kl-weight."
        )
    held_out = _held_out(judge, None if reward is not None or config.reward != "digit" else config.digit)

    print(f"[3/4] fine-tuning for {chosen.name!r} at {kl_weight:g} per nat of path KL")
    algorithm, value_params = _algorithm(config, model.sampler, chosen, kl_weight, layout)

    def evaluate_now(params) -> dict[str, Any]:
        found = evaluator.samples(params, keys["evaluation"], config.evaluation_samples // 4)
        numbers = summary(found, optimum, reference_reward, kl_weight)
        return {name if name.startswith("relative") else f"evaluation_{name}": v for name, v in numbers.items()}

    state, progress = finetune(
        directory, algorithm, algorithm.init(model.params, value_params), keys["finetune"], iterations=config.iterations,
        evaluate=lambda state: evaluate_now(_result(config, state)), evaluate_every=config.evaluate_every,
        observe=lambda info: {} if held_out is None else {"held_out_reward": held_out(info.samples)},
        checkpoint_every=config.checkpoint_every, kl_budget=config.kl_budget,
    )  # fmt: skip

    print("[4/4] evaluation and report")
    tuned = _result(config, state)
    _save(config.out / "model", model, tuned)
    final = evaluator.samples(tuned, keys["evaluation"], config.evaluation_samples)
    before = evaluator.reference_samples(keys["evaluation"], 64)
    weights = optimum.weights if optimum is not None else np.full(len(reference.x), 1 / len(reference.x))
    chosen_rows = np.random.default_rng(config.seed).choice(len(reference.x), 512, p=weights)
    at_optimum = Samples(reference.x[chosen_rows], reference.rewards[chosen_rows], None)
    arrays = {"before": before.x[:64], "after": final.x[:64], "optimum": at_optimum.x[:64]}
    arrays |= {
        "rewards_before": before.rewards[:64],
        "rewards_after": final.rewards[:64],
        "rewards_optimum": at_optimum.rewards[:64],
    }
    if judge is not None:
        arrays |= {
            "histogram_before": _histogram(judge, reference.x),
            "histogram_after": _histogram(judge, final.x),
            "histogram_optimum": _histogram(judge, reference.x, weights),
        }
    if is_first():
        write_arrays(config.out / "samples.npz", arrays)
    metrics = summary(final, optimum, reference_reward, kl_weight)
    metrics |= optimum_metrics(optimum, reference_reward, config.reference_samples)
    metrics |= diversities(images.x, reference.x, final.x, at_optimum.x)
    metrics |= {
        "held_out_reward": held_out and held_out(jnp.asarray(final.x)),
        "held_out_reward_reference": held_out and held_out(jnp.asarray(reference.x)),
        "pretrain_seconds": pretrain_seconds,
        "finetune_seconds": progress.seconds,
        "iterations": progress.iterations,
        "stop_reason": progress.stop_reason,
        "network_evaluations": progress.iterations * algorithm.calls.network,
        "network_gradient_evaluations": progress.iterations * algorithm.calls.gradient,
        "reward_evaluations": progress.iterations * algorithm.calls.reward,
        "pretrain_gradient_evaluations": config.pretrain_steps * config.pretrain_batch,
        "wall_seconds": time.perf_counter() - begin,
        "peak_rss_bytes": _peak_rss(),
    }
    directory.close()
    directory.finish(metrics)
    if is_first():
        _print_summary(metrics, write_report(config.out))
    return metrics


def _result(config: Config, state: Any) -> Any:
    """The parameters that are evaluated and saved."""
    return state.params if config.average is None else state.average


def _save(folder: Path, model: cd.DiffusionModel, params: Any) -> None:
    """The model with these parameters, written by the first process."""
    params = jax.tree.map(jnp.asarray, whole(params))
    if is_first():
        cd.save(folder, model._replace(params=params))


def _algorithm(
    config: Config, sampler: cd.Sampler, reward: cd.Reward, kl_weight: float, layout: Layout = ONE_DEVICE
) -> tuple[cd.Algorithm, Any]:
    """The algorithm by its name, and initial parameters of its value."""
    require_gradient(config.algorithm, reward)
    exploration = cd.Brownian()
    if config.exploration == "action":
        exploration = cd.ActionNoise(config.exploration_strength, config.exploration_substeps)
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
    )  # fmt: skip
    choice, value = choose(config.algorithm), value_for(reward, value_fn, sampler.process)
    algorithm = choice.make(Settings(objective, value, training, config.clip, config.horizon, config.kl_radius))
    return algorithm, value_params if choice.learns_value else ()


_NOT_IDENTIFYING = ("out", "devices", "use_previous_checkpoint", "wandb")
_STREAMS = ("classifier", "pretrain", "reference", "finetune", "evaluation")


def _check(config: Config, reward, images: datasets.Images) -> float:
    """Refuse settings that cannot work, by name, before anything is written; returns the price."""
    if reward is None and config.reward not in OF_DIGITS:
        close = difflib.get_close_matches(config.reward, OF_DIGITS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"reward={config.reward!r} is not one of {', '.join(OF_DIGITS)}.{hint}")
    if reward is None and config.reward == "digit" and images.y is None:
        raise ValueError('reward="digit" needs labelled data: choose ink, holes or bytes, or pass reward=...')
    if not 0 <= config.digit <= 9:
        raise ValueError(f"digit={config.digit} must be from 0 to 9.")
    if config.kl_weight is not None and not config.kl_weight >= 0:
        raise ValueError(
            f"kl_weight={config.kl_weight} must not be negative: it is the temperature, the price of a nat of path KL."
        )
    if config.kl_budget is not None and not config.kl_budget > 0:
        raise ValueError(f"kl_budget={config.kl_budget} must be positive: it is the path KL, in nats, that stops the run.")
    for name in ("steps", "pretrain_steps", "pretrain_batch", "width", "depth", "batch", "evaluate_every", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.reference_samples < 2 or config.evaluation_samples < 8:
        raise ValueError(
            "reference_samples and evaluation_samples must be at least 2 and 8: standard errors need several samples."
        )
    choice = choose(config.algorithm)
    if config.kl_weight is None:
        if not choice.priced:
            return 0.0
        if reward is not None:
            raise ValueError("kl_weight=None: a reward of your own has no default price; set it, in reward units per nat.")
        return OF_DIGITS[config.reward].kl_weight
    return config.kl_weight


def _settings(config: Config, kl_weight: float, reward, data, network) -> dict[str, Any]:
    """What identifies a run, as JSON."""
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name not in _NOT_IDENTIFYING} | {
        "kl_weight": kl_weight
    }
    if reward is not None:
        settings["reward"] = f"custom: {as_reward(reward).name}"
    if data is not None:
        settings["data"] = f"custom: {np.shape(data)}"
    settings["network"] = type(network).__name__
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in settings.items()}


def _classifiers(key: jax.Array, images: datasets.Images) -> tuple[LogProbabilities | None, LogProbabilities | None]:
    """The reward's classifier and the judge, from disjoint halves of the labelled data (`None` without labels)."""
    if images.y is None:
        return None, None
    order = np.random.default_rng(0).permutation(len(images.x))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    both = [
        train_classifier(jax.random.fold_in(key, i), jnp.asarray(images.x[h]), jnp.asarray(images.y[h]))[0]
        for i, h in enumerate(halves)
    ]
    return both[0], both[1]


def _held_out(judge: LogProbabilities | None, digit: int | None) -> Callable[[jax.Array], float] | None:
    """Mean log-probability under the judge of the digit asked for, or of the likeliest class ("is it still a digit?")."""
    if judge is None:
        return None

    @jax.jit
    def score(x):
        logp = judge(x)
        return jnp.mean(jnp.max(logp, axis=-1) if digit is None else logp[:, digit])

    return lambda x: float(score(x))


def _histogram(judge: LogProbabilities, x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    classes = np.asarray(jnp.argmax(judge(jnp.asarray(x)), axis=-1))
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
