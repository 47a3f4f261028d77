"""A model without its numbers: a copy made of fake tensors, to run, cut and capture at no cost."""

import copy
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import InputError, first_line
from compress.graph.capture import Capture, Forwards, capture, forwards_replaced, without_fused_attention
from compress.graph.custom import described_forwards


@dataclass(frozen=True)
class Skeleton:
    """A copy in evaluation mode whose parameters and buffers have shapes and no storage.

    Attributes:
        model: the copy.
        mode: to which its tensors belong.
        inputs: the forward pass's arguments, fake too.
    """

    model: nn.Module
    mode: FakeTensorMode
    inputs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Any]) -> "Skeleton":
        """Copy `model`, which is neither run nor changed.

        Raises:
            InputError: it cannot be copied.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def shape_of(tensor: Tensor) -> Tensor:
            # What `mode.from_tensor` does for an ordinary tensor, without its care for views and subclasses.
            return FakeTensor(mode, torch.empty_like(tensor, device="meta", requires_grad=False), tensor.device)

        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            shape = shape_of(parameter).requires_grad_(parameter.requires_grad)
            shape._is_param = True  # as nn.Parameter marks subclasses, without its copy
            memo[id(parameter)] = shape
        for buffer in model.buffers():
            memo[id(buffer)] = shape_of(buffer)
        for tensor in _computed(model):  # it cannot be copied
            memo[id(tensor)] = shape_of(tensor)
        fake = pytree.tree_map_only(Tensor, shape_of, tuple(inputs))
        try:
            return cls(copy.deepcopy(model, memo).eval(), mode, fake)
        except RuntimeError as error:
            raise InputError(
                f"The model cannot be copied: {first_line(error)}; keep tensors with a history of gradients out of it, "
                "or detach them."
            ) from error

    def captured(self, *, training: bool = False) -> Capture:
        """One forward pass as a graph.

        Raises:
            InputError: the forward pass fails, or decides by the values of tensors.
        """
        try:
            with _quiet():
                model = self.model.train(training)
                return capture(model, self.mode, self._inputs(training), described_forwards(model))
        except Exception as error:  # it fails with anything that the model's forward can raise
            raise InputError(
                f"The model cannot be captured as a graph: {self.cause(error)}; check that the example input fits, "
                "describe the module (compress.graph.custom_layer), or try graph='torch-pruning'."
            ) from error
        finally:
            self.model.eval()

    def run(self, *, training: bool = False) -> Any:
        """One forward pass."""
        return self._run(described_forwards(self.model), training)

    def cause(self, error: BaseException) -> str:
        """What went wrong in a forward pass, and in which module."""
        names = {id(module): name for name, module in self.model.named_modules()}
        met = [names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = next((f" in {name}" for name in reversed(met) if name), "")
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            return f"the forward pass depends on the values of a tensor ({error.func}{where})"
        return f"{first_line(error)}{where}"

    def multiply_adds(self) -> float:
        """Of one image: matrix products, convolutions and attention (`torch.utils.flop_counter`).

        Without those inside custom layers (`compress.graph.custom`), which the counter may not know.
        """
        # The counter asks for the gradient function of every argument, which a parameter handed to a module has not.
        self.model.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            inside = _Inside(counter.get_total_flops)
            described = described_forwards(self.model)
            self._run({module: inside.measured(forward) for module, forward in described.items()})
        return (counter.get_total_flops() - inside.total) / 2 / batch_size(self.inputs)

    @property
    def described(self) -> set[str]:
        """Names of the parameters inside custom layers."""
        own = {id(tensor) for module in described_forwards(self.model) for tensor in module.parameters()}
        return {name for name, tensor in self.model.named_parameters() if id(tensor) in own}

    def _run(self, forwards: Forwards, training: bool = False) -> Any:
        try:
            with torch.no_grad(), without_fused_attention(), forwards_replaced(forwards), self.mode, _quiet():
                return self.model.train(training)(*self._inputs(training))
        finally:
            self.model.eval()

    def _inputs(self, training: bool) -> tuple[Any, ...]:
        if not training:
            return self.inputs
        # Two images, for normalisation in training mode refuses a single value per channel.
        with self.mode:
            return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, self.inputs)


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history that modules keep, as a hook or a cache leaves them."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and isinstance(value, Tensor | dict | list | tuple):
                yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_leaf)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Inside:
    """How far `count` gets inside forward passes, those that run inside others not counted twice."""

    def __init__(self, count: Callable[[], float]) -> None:
        self.total = 0.0
        self._count = count
        self._open = False

    def measured(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                return forward(*args, **kwargs)
            before, self._open = self._count(), True
            try:
                return forward(*args, **kwargs)
            finally:
                self.total, self._open = self.total + self._count() - before, False

        return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from logging what fails: that is what a trial is for, and an error says it too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def batch_size(inputs: Sequence[Any]) -> int:
    """Number of images in the example inputs: the first dimension of the first tensor that has one."""
    leaves = pytree.tree_leaves(inputs)
    return next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
