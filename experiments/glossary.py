"""What every metric of a run means, in which unit; and the style of the page that shows them."""

# The unit of each named reward; a user's own reward is measured in "reward units".
UNITS = {"digit": "nats", "ink": "pixels", "holes": "holes", "bytes": "bytes"}

# group -> metric -> (unit, meaning); the unit "reward" stands for the unit of the reward
GLOSSARY = {
    "Result": {
        "relative_gap": ("", "(J* − J) / (J* − J of the reference): 1 at the reference, 0 at the optimum"),
        "optimality_gap": ("reward", "J* − J, how far the fine-tuned model is from the optimum"),
        "objective": ("reward", "J of the fine-tuned model: reward − kl_weight × path_kl"),
        "reward": ("reward", "mean reward of the fine-tuned model"),
        "path_kl": ("nats", "relative entropy of the fine-tuned sampler's paths with respect to the reference's"),
        "held_out_reward": (
            "nats",
            "the held-out judge's mean log-probability: of the digit asked for, else of the likeliest class",
        ),
    },
    "Reference (before fine-tuning)": {
        "reward_reference": ("reward", "mean reward of the reference"),
        "objective_reference": ("reward", "J of the reference: its reward, as its path KL is 0"),
        "held_out_reward_reference": ("nats", "the held-out judge's mean log-probability for the reference"),
    },
    "Optimum (reference samples weighted with exp(reward / kl_weight))": {
        "optimum": ("reward", "J*, the best J that any policy can reach"),
        "optimum_is_bound": ("", "whether J* is only an upper bound, as samples of the reference remember their initial noise"),
        "optimum_reward": ("reward", "mean reward at the optimum"),
        "optimum_path_kl": ("nats", "path KL at the optimum"),
        "optimum_samples": ("samples", "reference samples that the optimum is estimated from"),
        "effective_sample_size": (
            "samples",
            "equally weighted samples that would do as well; J* is not to be trusted below 100",
        ),
    },
    "Effective diversity (Vendi score of 512 images)": {
        "diversity": ("images", "the fine-tuned model: as diverse as this many completely different images"),
        "diversity_reference": ("images", "the reference"),
        "diversity_optimum": ("images", "the optimum"),
        "diversity_data": ("images", "the data"),
    },
    "Cost": {
        "wall_seconds": ("s", "the command in all, since it was last started"),
        "pretrain_seconds": ("s", "pre-training"),
        "finetune_seconds": ("s", "fine-tuning, evaluations excluded"),
        "iterations": ("", "fine-tuning iterations done"),
        "stop_reason": ("", "why fine-tuning ended"),
        "network_evaluations": ("", "network calls of fine-tuning on one image, without gradient"),
        "network_gradient_evaluations": ("", "network calls of fine-tuning on one image, with gradient"),
        "pretrain_gradient_evaluations": ("", "network calls of pre-training on one image, with gradient"),
        "peak_rss_bytes": ("bytes", "peak memory of the process"),
    },
}

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #59636e; --line: #d5dae0; --page: #fff; --soft: #f4f6f8;
  --mark: #0060a0; --alert: #fff4d6; --alert-line: #d99a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --quiet: #a0abb6; --line: #3a424b; --page: #14181c;
  --soft: #1e242a; --mark: #6db8ef; --alert: #352a0c; --alert-line: #d99a00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0.5rem 0 0.8rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; }
p { max-width: 46rem; margin: 0 0 0.9rem; }
.lead { font-size: 1.15rem; border-left: 4px solid var(--mark); padding-left: 0.9rem; }
aside { background: var(--alert); border-left: 4px solid var(--alert-line); padding: 0.7rem 0.9rem; margin: 0.8rem 0;
  max-width: 46rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; margin: 0; }
dl div { background: var(--soft); border-radius: 6px; padding: 0.8rem 0.95rem; }
dt { color: var(--quiet); font-size: 0.9rem; }
dd { margin: 0; font-size: 0.93rem; }
dd b { display: block; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
figure { margin: 0.6rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.8rem; }
.panels img { display: block; width: 100%; max-width: 36rem; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--quiet); font-size: 0.93rem; margin-top: 0.5rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
th { text-align: left; }
thead th, tbody th { padding: 0.5rem 0.8rem 0.35rem 0; }
tbody th { padding-top: 1.2rem; }
td { border-top: 1px solid var(--line); padding: 0.45rem 0.8rem 0.45rem 0; vertical-align: top; overflow-wrap: anywhere; }
td + td { font-variant-numeric: tabular-nums; min-width: 10.5rem; overflow-wrap: break-word; }
code { font: 0.9em ui-monospace, monospace; }
pre { background: var(--soft); border-radius: 6px; padding: 0.8rem 0.95rem; margin: 0 0 1.1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin-top: 1.6rem; border-top: 1px solid var(--line); padding-top: 0.8rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
"""
