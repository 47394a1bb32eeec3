"""The gallery of a text-to-image run: the same prompts and noise before and after, and what the numbers say.

    python -m experiments.text_to_image_report runs/text_to_image

reads `config.json`, `metrics.json`, `history.jsonl` and `images.npz` and writes `samples.png`, `curves.png` and `gallery.html`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.runs.images import mosaic

from ..figures import AFTER, BEFORE, FONT, Panel, figure, png, series
from ..pages import image, page, settings

GALLERY_STYLE = """
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.pair { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
.pair div { display: flex; gap: .4rem; } .pair img { width: 50%; image-rendering: auto; }
.pair p { margin: .3rem 0 0; font-size: .9rem; }
"""


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


def _image(array: np.ndarray, alt: str) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return image(file.getvalue(), alt)


def _pairs(images: Mapping[str, np.ndarray], name: str) -> str:
    cards = ""
    columns = (images[f"{name}_{part}"] for part in ("before", "after", "rewards_before", "rewards_after", "prompts"))
    for before, after, r_before, r_after, prompt in zip(*columns):
        both = _image(before, f"{prompt}, before") + _image(after, f"{prompt}, after")
        cards += f'<div class="pair"><div>{both}</div><p>{escape(str(prompt))}<br>{r_before:.4g} → {r_after:.4g}</p></div>\n'
    return f'<div class="pairs">\n{cards}</div>'


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
    "reward_evaluations": "images that the reward has judged in fine-tuning",
    "finetune_seconds": "fine-tuning, evaluations excluded, s",
    "wall_seconds": "the command in all, since it was last started, s",
}


def _number(metrics: Mapping[str, Any], name: str) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "not defined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _table(columns: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _page(config: Mapping[str, Any], metrics: Mapping[str, Any], images: Mapping[str, np.ndarray], history) -> str:
    title = f"Fine-tuning {Path(config['model']).name} for {' + '.join(config['reward'])}"
    lead = (
        f"Reward {_number(metrics, 'reward_before')} before, {_number(metrics, 'reward')} after {metrics['iterations']} iterations of "
        f"{config['algorithm']}, at a path KL of {_number(metrics, 'path_kl')} nats; on held-out prompts "
        f"{_number(metrics, 'held_out_reward_before')} before, {_number(metrics, 'held_out_reward')} after."
    )
    curves = image(png(figure(_curves(history, metrics))), "reward, path KL, other samplers")
    rows = "".join(
        f"<tr><td><code>{name}</code><br>{escape(text)}</td><td>{escape(_number(metrics, name))}</td></tr>\n"
        for name, text in MEANINGS.items()
    )
    prompts = "".join(
        f"<tr><td>{escape(p)}{' (held out)' if row['held_out'] else ''}</td><td>{row['images']}</td>"
        f"<td>{row['reward_before']:.4g}</td><td>{row['reward']:.4g}</td></tr>\n"
        for p, row in metrics["prompts"].items()
    )
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(lead)}</p>",
        "<h2>Prompts that were trained on</h2>\n<p>Left before, right after, from the same noise; not selected. Below: the rewards.</p>\n"
        + _pairs(images, "training"),
        "<h2>Held-out prompts</h2>\n" + _pairs(images, "held_out"),
        f"<h2>Progress and other samplers</h2>\n<figure>{curves}</figure>",
        f"<h2>All metrics</h2>\n{_table(('Metric', 'Value ± standard error'), rows)}",
        f"<details><summary>Prompts</summary>\n{_table(('Prompt', 'Images', 'Reward before', 'after'), prompts)}</details>",
        settings(config),
    ]
    return page(title, parts, GALLERY_STYLE)
