"""Runs of algorithms: folders, logs, checkpoints, exact resume, training loops, evaluation, devices and processes.

    run = RunDirectory("runs/mine", settings={...})
    model, _ = pretrain(run, model, data, key, ...)                      # only if the model is not pre-trained yet
    state, _ = finetune(run, algorithm, algorithm.init(model.params), key, iterations=100)
    run.finish(evaluate(objective, model.params, state.params, key))
    write_report(run.path)

Start the same program again to resume a stopped run: it repeats the uninterrupted run bit for bit. All functions take plain arguments.
No other module of the library imports this package.
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
from .identity import folder_digest as folder_digest, source_digest as source_digest
from .loggers import Logger as Logger, TensorBoard as TensorBoard, WeightsAndBiases as WeightsAndBiases
from .pretraining import pretrain as pretrain
from .progress import ProgressBar as ProgressBar
from .report import write_report as write_report
from .results import Results as Results
