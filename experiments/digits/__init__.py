"""Fine-tuning on handwritten digits: pre-training, the optimum, fine-tuning, evaluation and a report."""

from .experiment import Config as Config, run as run
