"""What a run's numbers say, in sentences that somebody who knows nothing of the run understands. Plain text, not HTML."""

import json
import math
import os
import shlex

from ..reward_registry import OF_DIGITS
from .results import Run, number, quantity

FEW_SAMPLES = 100  # effective samples below which the reweighted optimum is not to be trusted
HELD_OUT = (
    "The held-out reward is that of a second classifier, which took no part in fine-tuning and was trained on other images. "
    "If the reward rises and the held-out reward falls, the reward is being exploited."
)


def goal(run: Run) -> str:
    """What the reward asks for, in a few words."""
    name = str(run.config.get("reward"))
    words = {"ink": "more ink", "holes": "more holes", "bytes": "images that compress well"}
    if name == "digit":
        return f"the digit {run.config.get('digit')}"
    return words.get(name, f"the reward “{name.removeprefix('custom: ')}”")


def headline(run: Run) -> str:
    """The result and its standard error."""
    m, unit = run.metrics, run.unit
    reward, reference = m.get("reward"), m.get("reward_reference")
    change = ""
    if reward is not None and reference is not None:
        error = math.hypot(m.get("reward_se") or 0.0, m.get("reward_reference_se") or 0.0)
        verb = "stayed within two standard errors," if abs(reward - reference) <= 2 * error else "rose"
        verb = "fell" if reward < reference - 2 * error else verb
        change = f"The mean reward {verb} from {quantity(m, 'reward_reference', '')} to {quantity(m, 'reward', unit)}"
        change += f", at a path KL of {quantity(m, 'path_kl', 'nats')}." if m.get("path_kl") is not None else "."
    if not run.has_gap:
        return f"{change} No optimality gap is defined for this run."
    gap, se = m["relative_gap"], m.get("relative_gap_se")
    if gap > 1:
        result = "Fine-tuning ended below the reference"
    else:
        least = "at least " if m.get("optimum_is_bound") else ""
        closed = number(100 * (1 - gap), se and 100 * se)
        result = f"Fine-tuning closed {least}{closed} % of the distance from the reference to the optimum"
    most = "at most " if m.get("optimum_is_bound") and gap <= 1 else ""
    return f"{result}: relative optimality gap {most}{quantity(m, 'relative_gap', '')}. {change}"


def no_gap(run: Run) -> str:
    """Why there is no gap."""
    if run.config.get("eta") == 0:
        return (
            "At eta = 0 the sampler is deterministic: any change to it has infinite path KL from the reference, so neither the "
            "objective nor the gap is finite. Compare rewards, samples and classes with those at the optimum instead."
        )
    if run.config.get("kl_weight") == 0:
        return (
            "At kl_weight = 0 leaving the reference costs nothing, and the objective has no maximiser in general. "
            "Compare rewards at equal path KL instead."
        )
    return "The metrics of this run hold no relative gap."


def warnings(run: Run) -> list[tuple[str, str]]:
    """What a reader must know before believing the numbers: `(title, text)`."""
    m, found = run.metrics, []
    samples = m.get("effective_sample_size")
    if samples is not None and samples < FEW_SAMPLES:
        found.append(
            (
                "The optimum is uncertain.",
                f"It rests on {number(round(samples))} effective samples out of {number(m.get('optimum_samples'))} (at least "
                f"{FEW_SAMPLES} are wanted): J* and all that is measured against it may be off by more than the standard "
                "errors. More reference samples or a larger kl_weight help.",
            )
        )
    if m.get("optimum_is_bound"):
        found.append(
            (
                "J* is only an upper bound.",
                "Samples of this reference remember the noise they started from, over which fine-tuning has no control: the "
                f"true optimum may be lower{', and the gap is at most what is stated' if run.has_gap else ''}.",
            )
        )
    gap, se = m.get("optimality_gap"), m.get("optimality_gap_se")
    if gap is not None and gap < -3 * (se or 0.0):
        found.append(
            (
                "The gap is negative.",
                "No policy beats the optimum. So far below zero, either the optimum is underestimated or rewards or path KL "
                "are miscounted.",
            )
        )
    if not run.has_gap:
        found.append(("No optimality gap is defined.", no_gap(run)))
    reason, budget = m.get("stop_reason"), run.config.get("kl_budget")
    if reason not in (None, "finished"):
        because = f"The path KL exceeded its budget of {number(budget)} nats" if reason == "kl budget" else f"Reason: {reason},"
        iterations = f"{number(m.get('iterations'))} of {number(run.config.get('iterations'))} iterations"
        found.append(("Fine-tuning stopped early.", f"{because} after {iterations}."))
    return found


def meanings(run: Run) -> list[tuple[str, str, str]]:
    """The handful of numbers that matter: `(name, value, one sentence)`."""
    m, unit, kl_weight = run.metrics, run.unit, number(run.config.get("kl_weight"))
    bound = " Here it is an upper bound." if m.get("optimum_is_bound") else ""
    return [
        (
            "Mean reward",
            quantity(m, "reward", unit),
            f"What the fine-tuned model earns. The reference earns {quantity(m, 'reward_reference', unit)}, the optimum "
            f"{quantity(m, 'optimum_reward', unit)}.",
        ),
        (
            "J",
            quantity(m, "objective", unit),
            f"What the fine-tuned model achieves: its mean reward minus λ = {kl_weight} times its path KL.",
        ),
        (
            "J*",
            quantity(m, "optimum", unit),
            "The best value of J that any policy can reach, λ log E exp(reward / λ) over samples of the reference "
            f"(whose own J is {quantity(m, 'objective_reference', unit)}).{bound}",
        ),
        (
            "Path KL",
            quantity(m, "path_kl", "nats"),
            "How far the fine-tuned sampler moved from the reference: the relative entropy of its whole sampling paths, no "
            f"less than that of the images alone (0 for the reference, {quantity(m, 'optimum_path_kl', 'nats')} at the optimum).",
        ),
        (
            "Relative gap",
            quantity(m, "relative_gap", ""),
            "The share of the possible improvement that is still missing, (J* − J) / (J* − J of the reference): 1 for the "
            "reference, 0 for the optimum, no unit.",
        ),
        (
            "Effective diversity",
            quantity(m, "diversity", "images"),
            "As many completely different images would be as diverse as the samples (Vendi score). Before fine-tuning: "
            f"{quantity(m, 'diversity_reference', '')}; at the optimum: {quantity(m, 'diversity_optimum', '')}; "
            f"in the data: {quantity(m, 'diversity_data', '')}.",
        ),
    ]


def introduction(run: Run) -> list[str]:
    """What was done, in two paragraphs."""
    name = str(run.config.get("reward"))
    shape = " × ".join(map(str, run.samples["before"].shape[1:]))
    reward = OF_DIGITS[name].description if name in OF_DIGITS else f"the user's own function “{name.removeprefix('custom: ')}”"
    if name == "digit":
        reward += f"; here of the digit {run.config.get('digit')}"
    return [
        f"A diffusion model was trained to draw images like those of its data set ({shape}: height, width, channels). In that "
        f"state it is called the reference. Then it was fine-tuned to earn a reward: {reward}.",
        "A sampler makes an image from noise in many small steps, and fine-tuning learns how to steer them. What it maximises "
        "is the objective J = mean reward − λ × path KL: it rewards high rewards and penalises distance from the reference "
        f"(λ = {number(run.config.get('kl_weight'))}, in {run.unit} per nat of path KL). "
        + (
            "The reference can be sampled at will, so the best possible value J* is known: weighting its samples with "
            "exp(reward / λ) gives the optimum, and the result is measured against that."
            if run.metrics.get("optimum") is not None
            else "Without a KL penalty there is no optimum to compare with."
        ),
    ]


def commands(run: Run) -> tuple[str, str, str]:
    """How to repeat or resume the run, draw the report again, and load the model."""
    here = os.path.relpath(run.directory)
    directory = (here if not here.startswith("..") else str(run.directory)).replace(os.sep, "/")
    options = {name: v for name, v in run.config.items() if v is not None and name not in ("network", "data")}
    again = f"python -m experiments.digits --out {shlex.quote(directory)}"
    if "data" in run.config or str(run.config.get("reward")).startswith("custom"):
        again = "# experiments.digits.run(config, reward=..., data=...) with the same arguments"
    else:
        again += "".join(f" --{name.replace('_', '-')} {shlex.quote(str(v))}" for name, v in options.items())
    load = (
        "import jax, ctrl_diffusion\n"
        f"model = ctrl_diffusion.load({json.dumps(f'{directory}/model', ensure_ascii=False)})\n"
        "images = model.sample(jax.random.key(0), 16)"
    )
    return again, f"python -m experiments.report {shlex.quote(directory)}", load
