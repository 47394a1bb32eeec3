"""`python -m tests.killed POINT --out OUT`: a tiny run that ends itself with SIGKILL in an update, a checkpoint write, or never.

With the point "disk" no file may grow beyond 8 kB from the first checkpoint on, as on a full disk. No classifier is trained
for these images, which have no labels, and no report is written. Options are those of `experiments.digits`.
"""

import functools
import os
import resource
import signal
import sys

import jax.numpy as jnp
from sklearn.datasets import load_digits

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms import iteration
from ctrl_diffusion.runs import Checkpoints
from experiments.commandline import execute
from experiments.digits import experiment as digits

CONFIG = digits.Config(
    algorithm="sqdf", kl_weight=0.1, steps=4, pretrain_steps=20, pretrain_batch=32, width=16, depth=1, iterations=6, batch=24,
    minibatches=2, epochs=1, reference_samples=64, evaluation_samples=64, evaluate_every=3, checkpoint_every=1, average=0.9,
)  # fmt: skip


def killing(fn, at):
    """`fn`, but its call number `at` ends the process when it is done."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(None)
        result = fn(*args, **kwargs)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def main(point, *args):
    if point == "update":  # the first of the two updates of the second iteration is done
        iteration.one_update = killing(iteration.one_update, 3)
    elif point == "checkpoint":  # the third checkpoint is being written in the background
        Checkpoints.save = killing(Checkpoints.save, 3)
    elif point == "disk":
        save, calls = Checkpoints.save, []

        def full(*args):
            calls.append(None)
            if len(calls) == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # the log is shorter, a checkpoint has longer files
            save(*args)

        Checkpoints.save = full
    digits.write_report = lambda folder: folder
    reward = cd.differentiable(lambda x: jnp.mean(x[:, :, :3] - x[:, :, 3:], axis=(1, 2, 3)), "left")
    run = functools.partial(digits.run, reward=reward, data=load_digits().images[:200, :6, :6] / 8 - 1)
    sys.exit(execute(run, digits.Config, None, "tests.killed", args, defaults=lambda parsed: CONFIG))


if __name__ == "__main__":
    main(*sys.argv[1:])
