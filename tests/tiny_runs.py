"""Runs of experiments on a tiny budget, without what takes most of their time and has tests of its own: drawing and classifiers."""

import io
from typing import Any

import jax
import numpy as np
from PIL import Image

from experiments import classifier

DIGITS: dict[str, Any] = dict(
    steps=4, pretrain_steps=20, pretrain_batch=32, width=16, depth=1, batch=24, minibatches=2, epochs=1,
    reference_samples=64, evaluation_samples=64, evaluate_every=2, checkpoint_every=1,
)  # fmt: skip
TRAINED: dict[tuple, Any] = {}


def trained_once(key, x, y, **settings):
    """`train_classifier`, the same for the same arguments."""
    about = tuple(np.asarray(v).tobytes() for v in (jax.random.key_data(key), x, y)), tuple(settings.items())
    if about not in TRAINED:
        TRAINED[about] = classifier.train_classifier(key, x, y, **settings)
    return TRAINED[about]


def blank(figure) -> bytes:
    """A picture of one pixel in place of a figure, which is laid out and not drawn."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()
