"""What every metric of a run means, and in which unit."""

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
            "the held-out classifier's mean log-probability: of the digit asked for, else of the likeliest class",
        ),
    },
    "Reference (before fine-tuning)": {
        "reward_reference": ("reward", "mean reward of the reference"),
        "objective_reference": ("reward", "J of the reference: its reward, as its path KL is 0"),
        "held_out_reward_reference": ("nats", "the held-out classifier's mean log-probability for the reference"),
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
        "kl_weight": ("reward", "the weight of the KL penalty that the run is evaluated at, per nat of path KL"),
        "stop_reason": ("", "why fine-tuning ended"),
        "network_evaluations": ("", "network calls of fine-tuning on one image, without gradient"),
        "network_gradient_evaluations": ("", "network calls of fine-tuning on one image, with gradient"),
        "pretrain_gradient_evaluations": ("", "network calls of pre-training on one image, with gradient"),
        "peak_rss_bytes": ("bytes", "peak memory of the process"),
    },
}
