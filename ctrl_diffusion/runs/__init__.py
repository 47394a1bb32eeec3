"""Runs: a folder, logs, checkpoints and exact resume, the loops, the evaluation with its gap, devices and processes.

    run = RunDirectory("runs/mine", settings={...})
    model, _ = pretrain(run, model, data, key, ...)                      if it is not trained yet
    state, _ = finetune(run, algorithm, algorithm.init(model.params), key, iterations=100)
    run.finish(evaluate(algorithm's objective, model.params, state.params, key))
    write_report(run.path)

The same program again goes on where it was stopped, and repeats the uninterrupted run bit for bit. Everything is a function of plain
arguments; nothing below this package knows of it.
"""

from .checkpoints import Checkpoints as Checkpoints
from .devices import (
    describe as describe,
    exists_for_all as exists_for_all,
    is_first as is_first,
    start_devices as start_devices,
    wait_for_all as wait_for_all,
)
from .directory import RunDirectory as RunDirectory
from .evaluation import Evaluator as Evaluator, Samples as Samples, evaluate as evaluate
from .finetuning import Progress as Progress, finetune as finetune
from .loggers import Logger as Logger, TensorBoard as TensorBoard, WeightsAndBiases as WeightsAndBiases
from .pretraining import pretrain as pretrain
from .progress import ProgressBar as ProgressBar
from .report import write_report as write_report
from .results import Results as Results
