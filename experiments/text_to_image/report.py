"""The gallery of a text-to-image run: the same prompts and noise before and after, and what the numbers say.

    python -m experiments.text_to_image_report runs/text_to_image

reads `config.json`, `metrics.json`, `history.jsonl` and `images.npz` and writes `samples.png`, `curves.png` and `gallery.html`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.runs.images import mosaic

from ..figures import AFTER, BEFORE, FONT, Panel, figure, png, series
from ..pages import Picture, page


def write_gallery(directory: Path) -> Path:
    """Draw the figures of the finished run in `directory` and write `gallery.html` there; returns its path."""
    directory = Path(directory)
    missing = [
        name for name in ("config.json", "metrics.json", "history.jsonl", "images.npz") if not (directory / name).is_file()
    ]
    if missing:
        raise FileNotFoundError(f"{directory} holds no {', '.join(missing)}: pass the --out folder of a finished run.")
    config, metrics = (json.loads((directory / f"{name}.json").read_text()) for name in ("config", "metrics"))
    history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    with np.load(directory / "images.npz") as file:
        images = {name: file[name] for name in file.files}
    write_atomic(directory / "samples.png", png(figure(_grids(images), 4.2, 4.4)))
    write_atomic(directory / "curves.png", png(figure(_curves(history, metrics))))
    gallery = directory / "gallery.html"
    write_atomic(gallery, _page(config, metrics, images, history))
    return gallery


def _grids(images: Mapping[str, np.ndarray]) -> list[Panel]:
    def panel(name: str, title: str) -> Panel:
        def draw(axes: Axes) -> None:
            axes.imshow(mosaic(images[name][:16]))
            axes.set_axis_off()

        return Panel(title, f"16 images, {title}", draw)

    return [panel("training_before", "Before"), panel("training_after", "After, same prompts and noise")]


def _curves(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Panel]:
    def reward(axes: Axes) -> None:
        x, y, _ = series(history, "iteration", "reward")
        axes.plot(x + 1, y, color=BEFORE, lw=1.5, label="training images")
        x, y, se = series(history, "iteration", "evaluation_reward", "evaluation_reward_se")
        x, y, se = (
            np.concatenate([[first], v])
            for first, v in zip((-1, metrics["reward_before"], metrics["reward_before_se"]), (x, y, se))
        )
        axes.errorbar(x + 1, y, se, color=AFTER, marker="o", lw=1.5, capsize=3, label="evaluation, mean ± s.e.")
        axes.set_xlabel("iteration", fontsize=FONT)
        axes.set_ylabel("reward", fontsize=FONT)
        axes.legend(fontsize=FONT - 2, frameon=False)

    def kl(axes: Axes) -> None:
        x, y, _ = series(history, "iteration", "path_kl")
        axes.plot(x + 1, y, color=AFTER, lw=1.5)
        axes.set_xlabel("iteration", fontsize=FONT)
        axes.set_ylabel("path KL (nats)", fontsize=FONT)
        axes.set_ylim(bottom=0)

    def cells(axes: Axes) -> None:
        found = metrics["cells"]
        names = [f"{c['solver']}, {c['steps']} steps, η = {c['eta']:g}" for c in found]
        y = np.arange(len(found))[::-1]
        for key, colour, label in (("reward_before", BEFORE, "before"), ("reward", AFTER, "after")):
            axes.errorbar(
                [c[key] for c in found], y, xerr=[c[f"{key}_se"] for c in found], fmt="o", color=colour, capsize=3, label=label
            )
        axes.set_yticks(y, names, fontsize=FONT - 2)
        axes.set_xlabel("reward", fontsize=FONT)
        axes.legend(fontsize=FONT - 2, frameon=False)

    return [
        Panel("Reward", "reward of every iteration and of evaluations", reward),
        Panel("Distance to the original", "path KL of every iteration", kl),
        Panel("Other samplers", "reward before and after with other solvers and numbers of steps", cells),
    ]


def _picture(array: np.ndarray, alt: str) -> Picture:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return Picture(file.getvalue(), alt)


def _pairs(images: Mapping[str, np.ndarray], name: str) -> list[dict[str, Any]]:
    columns = (images[f"{name}_{part}"] for part in ("before", "after", "rewards_before", "rewards_after", "prompts"))
    return [
        {
            "before": _picture(before, f"{prompt}, before"),
            "after": _picture(after, f"{prompt}, after"),
            "prompt": prompt,
            "rewards": f"{reward_before:.4g} → {reward_after:.4g}",
        }
        for before, after, reward_before, reward_after, prompt in zip(*columns)
    ]


MEANINGS = {
    "reward": "mean reward after fine-tuning, on the training prompts",
    "reward_before": "of the original model, at the same noise",
    "gain": "mean difference of the two",
    "path_kl": "relative entropy of the fine-tuned sampler's paths with respect to the original's, nats",
    "objective": "reward minus kl_weight times path KL",
    "held_out_reward": "mean reward after fine-tuning, on prompts that were not trained on",
    "held_out_reward_before": "of the original model",
    "held_out_gain": "mean difference of the two",
    "held_out_path_kl": "path KL on these prompts, nats",
    "diversity_before": "mean distance between two images of a prompt (root mean square over 16x16 thumbnails in [-1, 1]), original model",
    "diversity_after": "the same after fine-tuning",
    "held_out_diversity_before": "on the prompts that were not trained on, original model",
    "held_out_diversity_after": "the same after fine-tuning",
    "trained_parameters": "numbers that were trained",
    "network_evaluations": "network calls of fine-tuning on one image, without gradient (guidance makes two of each)",
    "network_gradient_evaluations": "network calls of fine-tuning on one image, with gradient",
    "reward_evaluations": "images that the reward was evaluated on in fine-tuning",
    "finetune_seconds": "fine-tuning, evaluations excluded, s",
    "wall_seconds": "the command in all, since it was last started, s",
}


def _number(metrics: Mapping[str, Any], name: str) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "not defined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _page(config: Mapping[str, Any], metrics: Mapping[str, Any], images: Mapping[str, np.ndarray], history) -> str:
    return page(
        "text_to_image/gallery.html",
        title=f"Fine-tuning {Path(config['model']).name} for {' + '.join(config['reward'])}",
        config=config,
        metrics=metrics,
        number=partial(_number, metrics),
        training=_pairs(images, "training"),
        held_out=_pairs(images, "held_out"),
        curves=Picture(png(figure(_curves(history, metrics))), "reward, path KL, other samplers"),
        meanings=MEANINGS,
    )
