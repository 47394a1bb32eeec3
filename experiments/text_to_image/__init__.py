"""Fine-tuning of Stable Diffusion from its own files, prompts and a reward."""
