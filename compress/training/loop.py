"""The minibatches of a training: forward, backward, pruner, optimizer."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel

from compress.errors import InputError, WorkError
from compress.importance import Minibatch
from compress.progress import Bar
from compress.tasks import Task, prediction
from compress.training.distillation import training_loss
from compress.training.placement import best_layout, moved, set_layout
from compress.training.schedule import TrainingConfig, build_optimizer, learning_rate


class Pruning(Protocol):
    """What `fit` asks of a pruner: `compress.pruner.Pruner`, or anything that removes channels in place."""

    @property
    def finished(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]:
        """What it reads at a step (`compress.importance.Importance.needs`)."""

    def step(self, optimizer: optim.Optimizer, *, loss: float, minibatch: Minibatch) -> object | None:
        """Observe the gradients, or run the minibatch; not None says that channels were removed."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """The optimizer steps of one training, and what they change from one to the next."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        config: TrainingConfig,
        pruner: Pruning | None,
        teacher: nn.Module | None,
        task: Task,
    ) -> None:
        self.optimizer = build_optimizer(model, config)
        self._accelerator = accelerator
        self._model = model
        self._forward = model
        self._config = config
        self._pruner = pruner
        self._teacher = None if teacher is None else teacher.eval()
        self._task = task
        self._layout: torch.memory_format | None = None
        self._wrapped = False

    def state_dict(self) -> dict[str, Any]:
        """Everything but the history that the next epoch depends on."""
        scaler = self._accelerator.scaler
        return {
            "model": self._model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "pruner": None if self._pruner is None else self._pruner.state_dict(),
        }

    def run_epoch(
        self, loader: Iterable[tuple[Any, Any]], epoch: int, first_step: int, bar: Bar
    ) -> tuple[int, float, float]:
        """Train until the batches, or the pruner, end; returns (steps, mean loss, last learning rate)."""
        steps, total, rate = 0, 0.0, 0.0
        length = len(loader)  # type: ignore[arg-type]  # checked by _check_arguments
        self._model.train()
        for images, labels in loader:
            images = moved(images, self._accelerator.device)
            labels = moved(labels, self._accelerator.device)
            if steps == 0:
                self._arrange(images)
            rate = learning_rate(self._config, first_step + steps, length)
            loss = self._step(images, labels, rate)
            if not math.isfinite(loss):
                raise WorkError(
                    f"The training loss is {loss} at epoch {epoch + 1}, step {steps + 1} of {length}, with "
                    f"the learning rate {rate:g}: the training diverged; lower learning_rate or lengthen "
                    "warmup_epochs."
                )
            steps += 1
            total += loss
            bar.advance(f"epoch {epoch + 1}, loss {loss:.3f}")
            if self._pruner is not None and self._pruner.finished:
                break
        if steps == 0:
            raise InputError(
                f"The training loader yields no batch in epoch {epoch + 1}: it must start anew at every "
                "pass; correct what data.source returns."
            )
        return steps, total / steps, rate

    def _step(self, images: Any, labels: Any, rate: float) -> float:
        """One minibatch; returns its loss, and where that is not finite leaves the network as it was."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if isinstance(images, Tensor):
            images = images.contiguous(memory_format=self._layout or torch.contiguous_format)
        inputs = self._task.inputs(images, labels)
        self.optimizer.zero_grad()
        if not self._wrapped:
            self._wrap()
        with self._accelerator.autocast():
            outputs = self._outputs(inputs)
            with torch.no_grad():
                taught = None if self._teacher is None else prediction(self._teacher(images))
        loss = self._loss(labels, taught)(outputs)
        value = loss.item()
        if math.isfinite(value):
            self._accelerator.backward(loss)
            self._update(value, Minibatch(inputs, self._loss(labels, taught)))
        return value

    def _outputs(self, inputs: tuple[Any, ...]) -> Any:
        try:
            return self._forward(*inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "A minibatch of one image leaves a batch normalisation a single value per channel to take the mean of: "
                "set data.batch_size to 2 or more, or give more training images."
            ) from error

    def _loss(self, labels: Any, taught: Tensor | None) -> Callable[[Any], Tensor]:
        """Outputs for the minibatch -> the loss that is trained on."""
        return partial(
            training_loss,
            labels=labels,
            task=self._task,
            label_smoothing=self._config.label_smoothing,
            distillation=self._config.distillation,
            teacher_logits=taught,
        )

    def _update(self, loss: float, minibatch: Minibatch) -> None:
        """Let the pruner see the gradients, then move the weights."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self._pruner is not None and (scaler is None or self._gradients_are_finite()):
            event = self._pruner.step(self.optimizer, loss=loss, minibatch=minibatch)
            self._wrapped = self._wrapped and event is None
        if scaler is None:
            self.optimizer.step()
        else:
            # Skips the update when a gradient overflowed at this scale, which is how the scale is found.
            scaler.step(self.optimizer)
            scaler.update()

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _arrange(self, images: Any) -> None:
        """Choose the memory layout at the first call; renew it at the start of every epoch.

        Renewed, for pruning and reloading give tensors of other strides, and a resumed epoch must not compute
        with other kernels than an unbroken one.
        """
        networks = [self._model] if self._teacher is None else [self._model, self._teacher]
        if self._layout is None:
            choices = [best_layout(network, images) for network in networks]
            channels_last = all(choice == torch.channels_last for choice in choices)
            self._layout = torch.channels_last if channels_last else torch.contiguous_format
        for network in networks:
            set_layout(network, self._layout)

    def _wrap(self) -> None:
        """Wrap the model for several processes, anew after every removal of channels.

        Never within the step of the removal: autograd keeps the old shapes of the parameters as long as the
        old wrapper, or a loss computed with them, is alive.
        """
        self._forward = self._model
        self._wrapped = True
        if self._accelerator.num_processes > 1:
            device = self._accelerator.device
            self._forward = DistributedDataParallel(self._model, device_ids=[device] if device.type == "cuda" else None)
