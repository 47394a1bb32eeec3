"""Fine-tuning of Stable Diffusion: the run, its evaluations and what it writes."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd
from ctrl_diffusion.algorithms import Info, State
from ctrl_diffusion.optimum import mean_and_error
from ctrl_diffusion.parallel import Layout, whole
from ctrl_diffusion.rewards import try_reward
from ctrl_diffusion.runs import (
    Evaluator,
    RunDirectory,
    Samples,
    describe,
    finetune,
    folder_digest,
    is_first,
    source_digest,
)
from ctrl_diffusion.runs.files import write_arrays

from ..random_model.config import TINY
from ..reward_registry import own_function
from .checks import check, kl_weight_of
from .config import Config as Config
from .parts import Parts, load_parts, make_algorithm, make_sampler, rows_of_prompts, save_trained
from .prompts import digest_of_prompts
from .report import write_gallery

_ABOUT = (
    *("devices", "use_previous_checkpoint", "settings", "iterations", "evaluate_every", "checkpoint_every"),
    *("accumulation", "rollouts", "remat", "attention", "attention_chunk", "decode_chunk"),
    *("model", "prompts", "held_out_prompts", "reward_folder"),
)
"""Settings that do not make a run another one. Of a model, prompts and reward models the content counts, not the place."""
_EVALUATION = ("evaluation_samples", "evaluation_solvers", "evaluation_steps")
_STREAMS = ("finetune", "evaluation")
SHOWN = 32  # images of each kind in the gallery
LOGGED = 16  # images of each evaluation that loggers get


class Pair(NamedTuple):
    """The same prompts and noise before and after."""

    before: Samples
    after: Samples
    prompt: np.ndarray


def run(config: Config) -> dict[str, Any]:
    """The whole experiment; returns the metrics, which are also in `config.out / "metrics.json"`."""
    begin = time.perf_counter()
    check(config)
    layout = config.devices.start()
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name != "out"}
    about, evaluation = ({name: settings.pop(name) for name in names if name in settings} for names in (_ABOUT, _EVALUATION))
    directory = RunDirectory(
        config.out, _as_json(settings | _digests(config)), about=_as_json(about), evaluation=_as_json(evaluation),
        iterations=config.iterations, use_previous_checkpoint=config.use_previous_checkpoint,
    )  # fmt: skip
    if (finished := directory.finished("gallery.html", write_gallery)) is not None:
        return finished
    print(describe(layout, batch=config.batch, evaluation_samples=config.evaluation_samples))
    parts = load_parts(config, layout)
    sampler = make_sampler(config, parts, steps=config.steps, eta=config.eta)
    few = 2 if layout.devices == 1 else layout.devices
    noise, prompt = jax.random.normal(jax.random.key(0), (few, *sampler.shape)), jnp.zeros(few, jnp.int32)
    try_reward(parts.reward, *layout.put((noise, prompt), layout.batch))
    algorithm, value_params = make_algorithm(config, parts, sampler, layout)
    count, kl_weight = sum(leaf.size for leaf in jax.tree.leaves(parts.params)), kl_weight_of(config)
    print(
        f"[1/3] {parts.trained} prompts, {parts.held_out} held out{_repeated(parts)}; "
        f"{count:,} parameters are trained, latents {sampler.shape}; "
        f"{config.algorithm} for {parts.reward.name!r} with kl_weight {kl_weight:g}"
    )
    keys = {name: jax.random.fold_in(jax.random.key(config.seed), i) for i, name in enumerate(_STREAMS)}
    evaluations = Evaluations(config, parts, layout, keys["evaluation"])

    print("[2/3] fine-tuning")

    def evaluate(state: State) -> dict[str, Any]:
        found = evaluations.pair(sampler, _result(config, state), "training prompts", held_out=False)
        numbers = {f"evaluation_{name}": v for name, v in _numbers(found, kl_weight).items()}
        return numbers | {"samples": decoded(parts, found.after.x[:LOGGED])}

    def keep(iteration: int, state: State) -> None:
        params = whole(_result(config, state))
        if is_first():
            name = "lora" if config.train == "lora" else "unet"
            save_trained(parts, params, config.out / name / f"iteration_{iteration:05d}", config.train)

    state, progress = finetune(
        directory, algorithm, algorithm.init(parts.params, value_params), keys["finetune"], iterations=config.iterations,
        evaluate=evaluate, observe=lambda info: _of_prompts(info, parts.trained), keep=keep, evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every, kl_budget=config.kl_budget,
    )  # fmt: skip

    print("[3/3] evaluation and gallery")
    tuned = _result(config, state)
    trained_on = evaluations.pair(sampler, tuned, "training prompts", held_out=False)
    held_out = evaluations.pair(sampler, tuned, "held-out prompts", held_out=True)
    metrics: dict[str, Any] = _numbers(trained_on, kl_weight) | {
        f"held_out_{name}": v for name, v in _numbers(held_out, kl_weight).items()
    }
    images = {}
    for name, pair in (("training", trained_on), ("held_out", held_out)):
        for when in ("before", "after"):
            images[f"{name}_{when}"] = shown = decoded(parts, getattr(pair, when).x)
            metrics[f"{'' if pair is trained_on else 'held_out_'}diversity_{when}"] = prompt_diversity(shown, pair.prompt)
    metrics["cells"] = evaluations.cells(tuned, trained_on)
    metrics["prompts"] = _table(parts, trained_on) | _table(parts, held_out)
    metrics |= {
        "iterations": progress.iterations,
        "stop_reason": progress.stop_reason,
        "finetune_seconds": progress.seconds,
        "trained_parameters": count,
        "network_evaluations": progress.iterations * algorithm.calls.network,
        "network_gradient_evaluations": progress.iterations * algorithm.calls.gradient,
        "reward_evaluations": progress.iterations * algorithm.calls.reward,
        "wall_seconds": time.perf_counter() - begin,
    }
    directory.close()
    if is_first():
        _write_images(config, parts, images, {"training": trained_on, "held_out": held_out})
    directory.finish(metrics)
    if is_first():
        write_gallery(config.out)
        print(
            f"reward {metrics['reward_before']:.4g} -> {metrics['reward']:.4g} +- {metrics['reward_se']:.2g} (held-out prompts "
            f"{metrics['held_out_reward_before']:.4g} -> {metrics['held_out_reward']:.4g} +- {metrics['held_out_reward_se']:.2g}), "
            f"path KL {metrics['path_kl']:.3g} nats; {metrics['wall_seconds']:.0f} s. Gallery: {config.out / 'gallery.html'}"
        )
    return metrics


def _digests(config: Config) -> dict[str, str]:
    """What the settings refer to: prompts, the model, and rewards of one's own or of files."""
    found = {"prompts_digest": digest_of_prompts(config)}
    found["model_digest"] = TINY if config.model == TINY else folder_digest(sd.find_folder(config.model))
    for name in config.reward:
        files = config.reward_folder / name
        digest = source_digest(own_function(name)) if ":" in name else folder_digest(files) if files.is_dir() else None
        found |= {} if digest is None else {f"{name}_digest": digest}
    return found


def _repeated(parts: Parts) -> str:
    """How many prompts the files repeat, in words."""
    extra = sum(parts.weights) - len(parts.weights)
    return f" ({extra} repeated: drawn in proportion)" if extra else ""


class Evaluations:
    """Images before and after at the same noise and prompts; those before are made once and kept in `before/`."""

    def __init__(self, config: Config, parts: Parts, layout: Layout, key: jax.Array):
        self.config, self.parts, self.layout, self.key = config, parts, layout, key
        self._evaluators: dict[Any, Evaluator] = {}

    def pair(self, sampler: cd.Sampler, params: Any, label: str, *, held_out: bool, name: str = "own") -> Pair:
        """Both, on the training prompts or on those held out."""
        n, parts = self.config.evaluation_samples, self.parts
        first, count = (parts.trained, parts.held_out) if held_out else (0, parts.trained)
        prompt, key = rows_of_prompts(first, min(count, max(1, n // 2)), n), jax.random.fold_in(self.key, int(held_out))
        evaluator = self._evaluator(name, sampler)
        file = self.config.out / "before" / f"{name}_{'held_out' if held_out else 'training'}_{n}.npz"
        before = evaluator.reference_samples(key, n, jnp.asarray(prompt), file)
        return Pair(before, evaluator.samples(params, key, n, jnp.asarray(prompt), label), prompt)

    def cells(self, params: Any, own: Pair) -> list[dict[str, Any]]:
        """Rewards at other numbers of steps with the same noise level, and by other solvers of the probability-flow ODE.

        The first is that of the sampler trained with, whose images are `own`.
        """
        config, trained = self.config, ("ExponentialEuler", self.config.steps, self.config.eta)
        cells = [trained]
        cells += [("ExponentialEuler", steps, config.eta) for steps in config.evaluation_steps if steps != config.steps]
        cells += [(solver, config.steps, 0.0) for solver in config.evaluation_solvers]
        found = []
        for solver, steps, eta in cells:
            pair, name = own, f"{solver}_{steps}_{eta:g}"
            if (solver, steps, eta) != trained:
                sampler = make_sampler(config, self.parts, steps=steps, eta=eta, solver=solver)
                pair = self.pair(sampler, params, name, held_out=False, name=name)
            numbers = _numbers(pair, 0.0)
            found.append({"solver": solver, "steps": steps, "eta": eta, **{k: numbers[k] for k in CELL}})
        return found

    def _evaluator(self, name: str, sampler: cd.Sampler) -> Evaluator:
        if name not in self._evaluators:
            scales = sampler.chain_scales() if name == "own" else None
            chunk = min(self.config.batch // self.config.rollouts, self.config.evaluation_samples)
            self._evaluators[name] = Evaluator(sampler, self.parts.reward, self.parts.params, scales, chunk, self.layout)
        return self._evaluators[name]


CELL = ("reward", "reward_se", "reward_before", "reward_before_se", "gain", "gain_se")


def _numbers(pair: Pair, kl_weight: float) -> dict[str, float | None]:
    """Rewards before and after, their difference at the same noise, path KL and objective, with standard errors."""
    samples = {
        "reward": pair.after.rewards,
        "reward_before": pair.before.rewards,
        "gain": pair.after.rewards - pair.before.rewards,
    }
    if pair.after.path_kl is not None:
        samples |= {"path_kl": pair.after.path_kl, "objective": pair.after.rewards - kl_weight * pair.after.path_kl}
    found: dict[str, float | None] = {}
    for name, v in samples.items():
        estimate = mean_and_error(v)
        found |= {name: estimate.mean, f"{name}_se": estimate.se}
    return found


def _of_prompts(info: Info, count: int) -> dict[str, Any]:
    """Mean rewards of the best and the worst prompt of an iteration, and the spread within prompts."""
    rewards, prompt = np.asarray(whole(info.rewards)), np.asarray(whole(info.cond))
    number = np.bincount(prompt, minlength=count)
    mean = np.bincount(prompt, rewards, minlength=count) / np.maximum(number, 1)
    within = float(np.sqrt(np.mean((rewards - mean[prompt]) ** 2)))
    present = mean[number > 0]
    return {
        "reward_best_prompt": float(present.max()),
        "reward_worst_prompt": float(present.min()),
        "reward_within_prompts": within,
    }


def _table(parts: Parts, pair: Pair) -> dict[str, Any]:
    """Rewards by prompt."""
    found = {}
    for i in np.unique(pair.prompt):
        rows = pair.prompt == i
        found[parts.prompts[i]] = {
            "images": int(rows.sum()),
            "reward_before": float(pair.before.rewards[rows].mean()),
            "reward": float(pair.after.rewards[rows].mean()),
            "held_out": bool(i >= parts.trained),
        }
    return found


def decoded(parts: Parts, latents: np.ndarray) -> np.ndarray:
    """Images `[n, h, w, 3]` in [-1, 1] of latents."""
    return np.asarray(_decode(parts.decode, jnp.asarray(latents)))


@eqx.filter_jit
def _decode(decode: Any, latents: jax.Array) -> jax.Array:
    return decode(latents)


def prompt_diversity(images: np.ndarray, prompt: np.ndarray) -> float | None:
    """Mean distance between two images of a prompt, root mean square over 16x16 thumbnails in [-1, 1]; null without pairs."""
    n, height, width, channels = images.shape
    side = min(16, height, width)
    cropped = images[:, : height - height % side, : width - width % side]
    small = cropped.reshape(n, side, height // side, side, width // side, channels).mean(axis=(2, 4)).reshape(n, -1)
    distances = np.sqrt(np.mean((small[:, None] - small[None]) ** 2, axis=-1))
    pairs = (prompt[:, None] == prompt[None]) & ~np.eye(n, dtype=bool)
    return float(distances[pairs].mean()) if pairs.any() else None


def _write_images(config: Config, parts: Parts, images: dict[str, np.ndarray], pairs: dict[str, Pair]) -> None:
    arrays = {name: np.round(127.5 * (x[:SHOWN] + 1)).astype(np.uint8) for name, x in images.items()}
    for name, (before, after, prompt) in pairs.items():
        arrays[f"{name}_rewards_before"], arrays[f"{name}_rewards_after"] = before.rewards[:SHOWN], after.rewards[:SHOWN]
        arrays[f"{name}_prompts"] = np.asarray([parts.prompts[i] for i in prompt[:SHOWN]])
    write_arrays(config.out / "images.npz", arrays)


def _result(config: Config, state: State) -> Any:
    """The parameters that are evaluated and saved."""
    return state.params if config.average is None else state.average


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) or v == float("inf") else v for name, v in settings.items()}
