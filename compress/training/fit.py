"""Training a network: from scratch, while it is pruned, or back to accuracy after pruning.

Device, mixed precision and processes come from accelerate. Start several processes with `accelerate launch`;
the batch size is then that of one process.
"""

import logging
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import InputError
from compress.progress import progress_bar
from compress.tasks import CLASSIFICATION, Task
from compress.training.evaluation import evaluate_on
from compress.training.history import Epoch, History
from compress.training.loop import Loop, Pruning
from compress.training.placement import opened_accelerator, placed, sharded
from compress.training.preflight import check_precision
from compress.training.resume import load_state, save_state, structure_digest
from compress.training.schedule import TrainingConfig

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    loader: DataLoader,
    config: TrainingConfig,
    *,
    seed: int,
    pruner: Pruning | None = None,
    teacher: nn.Module | None = None,
    test_loader: DataLoader | None = None,
    task: Task = CLASSIFICATION,
    state_path: Path | None = None,
    description: str = "training",
) -> History:
    """Train `model` in place and leave it in evaluation mode, on the device where it was.

    With a pruner the training ends at the very minibatch at which `pruner.finished` turns true, however many
    epochs that takes: `config.epochs` is not used, and the schedule must be "constant", for no other knows
    its length.

    With `state_path` the state is saved after every epoch, and the same call in a new process goes on after
    the last one saved; on a CPU the outcome is then the same to the bit as without interruption. `model`,
    `pruner` and `teacher` must be as they were at the first call. Work within an epoch is repeated. The
    caller deletes the file.

    The global random number generators of Python, NumPy and torch are seeded from (seed, epoch) at the start
    of each epoch; a loader must draw its randomness from them.

    Args:
        loader: yields (images (N, C, H, W) float, labels (N,) int64), or what `task` takes, and has a length.
        teacher: dense network for `config.distillation`; runs in evaluation mode without gradients.
        description: what the progress bar and the log call this training.

    Raises:
        InputError: the arguments contradict each other, the loader is empty, or the state file is not usable.
        WorkError: the loss is not finite.
    """
    _check_arguments(config, loader, pruner, teacher)
    with ExitStack() as stack:
        accelerator = stack.enter_context(opened_accelerator(config.precision))
        for network in (model, teacher):
            if network is not None:
                stack.enter_context(placed(network, accelerator.device))
        loader = sharded(loader, accelerator, seed=seed)
        fingerprint = _fingerprint(model, loader, config, seed, pruner, teacher, test_loader, task, accelerator)
        state = load_state(state_path, fingerprint) if state_path else None
        if state and pruner:
            pruner.load_state_dict(state["pruner"])
        if state:
            model.load_state_dict(state["model"])
        loop = Loop(accelerator, model, config, pruner, teacher, task)
        history = History()
        if state:
            loop.optimizer.load_state_dict(state["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
            history = History.from_dict(state["history"])
            logger.info("%s: resuming after epoch %d from %s", description, len(history.epochs), state_path)

        total = None if pruner else config.epochs * len(loader)
        bar = stack.enter_context(progress_bar(description, total, visible=accelerator.is_main_process))
        bar.skip_to(history.steps)
        while not (pruner.finished if pruner else len(history.epochs) >= config.epochs):
            started = time.perf_counter()
            number = len(history.epochs)
            _seed_everything(seed, number, accelerator.process_index)
            if accelerator.num_processes > 1:
                loader.set_epoch(number)  # type: ignore[attr-defined]  # a loader of accelerate's
            steps, loss, rate = loop.run_epoch(loader, number, history.steps, bar)
            test = None if test_loader is None else evaluate_on(accelerator, model, test_loader, task=task)
            history.epochs.append(Epoch(steps, loss, rate, time.perf_counter() - started, test))
            if not bar.shown and accelerator.is_main_process:
                _log_epoch(description, history, config, pruning=pruner is not None)
            if state_path is not None and accelerator.is_main_process:
                parts = {"history": history.as_dict(), **loop.state_dict()}
                save_state(state_path, fingerprint, parts)
            accelerator.wait_for_everyone()
        loop.optimizer.zero_grad()
    model.eval()
    return history


def _check_arguments(
    config: TrainingConfig, loader: DataLoader, pruner: Pruning | None, teacher: nn.Module | None
) -> None:
    if (config.distillation is None) != (teacher is None):
        raise InputError("Distillation needs both a teacher and the setting distillation: give both, or neither.")
    if pruner is not None and config.schedule != "constant":
        raise InputError(
            f"The schedule {config.schedule} needs to know the length of the training, which a pruner "
            "decides as it goes: set schedule: constant for pruning."
        )
    if pruner is not None:
        check_precision(config.precision, pruner.needs)
    try:
        batches = len(loader)
    except TypeError as error:
        raise InputError(
            "The training loader has no length, which the schedule needs: return a loader with len() from data.source."
        ) from error
    if batches == 0:
        raise InputError(
            "The training loader has no batch: give more images in data.source, or a smaller data.batch_size."
        )


def _fingerprint(
    model: nn.Module,
    loader: DataLoader,
    config: TrainingConfig,
    seed: int,
    pruner: Pruning | None,
    teacher: nn.Module | None,
    test_loader: DataLoader | None,
    task: Task,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What must be equal for a saved state to be the beginning of this very training."""
    return {
        **config.model_dump(mode="json"),
        "seed": seed,
        "training batches": len(loader),
        "batch size": getattr(loader, "batch_size", None),
        "test batches": None if test_loader is None else len(test_loader),
        "model structure": structure_digest(model),
        "teacher structure": None if teacher is None else structure_digest(teacher),
        "pruner": None if pruner is None else type(pruner).__name__,
        "task": type(task).__name__,
        "processes": accelerator.num_processes,
    }


def _seed_everything(seed: int, epoch: int, process: int) -> None:
    """Seed all global generators; processes differ, so that they do not augment alike."""
    mixed = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _log_epoch(description: str, history: History, config: TrainingConfig, pruning: bool) -> None:
    epoch = history.epochs[-1]
    number = str(len(history.epochs)) if pruning else f"{len(history.epochs)}/{config.epochs}"
    accuracy = "" if epoch.test is None else f", {epoch.test.metric} {epoch.test.top1:.2f} %"
    logger.info(
        "%s: epoch %s, loss %.4f, learning rate %.3g%s, %.1f s",
        description,
        number,
        epoch.train_loss,
        epoch.learning_rate,
        accuracy,
        epoch.seconds,
    )
