"""The PyTorch runtime: a module as it is, in eager mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import InputError, WorkError
from deploy.runtimes.base import Runtime, Step, TensorSpec

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block; afterwards each is back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class PyTorchRuntime(Runtime):
    """A module from images to logits, held in eval mode until `close`, which gives it its former mode back.

    PyTorch's number of threads belongs to the process: `threads` sets it for everything else, too.
    """

    def __init__(self, model: nn.Module, *, device: str = "cpu", threads: int | None = None) -> None:
        self._device = torch.device(device)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if tensor.device.type != self._device.type:
                raise InputError(
                    f"The model's {name} is on {tensor.device}, not on {device} as asked; "
                    f'move it with model.to("{device}").'
                )
        if threads is not None:
            torch.set_num_threads(threads)
        floating = [tensor.dtype for _, tensor in tensors if tensor.is_floating_point()]
        dtype = str(floating[0] if floating else torch.float32).removeprefix("torch.")
        self.inputs = (TensorSpec(INPUT_NAME, dtype, ("batch", None, None, None)),)
        self.outputs = (TensorSpec(OUTPUT_NAME, dtype, ("batch", None)),)
        self._model = model
        self._modes = ExitStack()
        self._modes.enter_context(evaluating(model))

    def close(self) -> None:
        self._modes.close()
        super().close()

    def description(self) -> dict[str, Any]:
        return {
            "runtime": "pytorch",
            "version": torch.__version__,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
        }

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step = self._bind(batch)
        step()
        return step.outputs()

    def _bind(self, batch: dict[str, np.ndarray]) -> "_PyTorchStep":
        return _PyTorchStep(self._model, torch.from_numpy(batch[INPUT_NAME]).to(self._device))


class _PyTorchStep(Step):
    """Eager PyTorch allocates its outputs anew in every call; that belongs to what its user waits for."""

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self._model = model
        self._images = images
        self._logits: Any = None

    def __call__(self) -> None:
        try:
            with torch.inference_mode():
                self._logits = self._model(self._images)
            if self._images.is_cuda:
                torch.cuda.synchronize(self._images.device)
        except RuntimeError as error:
            shape = tuple(self._images.shape)
            raise WorkError(f"PyTorch failed on a batch of shape {shape}: {error}") from error

    def outputs(self) -> dict[str, np.ndarray]:
        if not isinstance(self._logits, torch.Tensor):
            raise InputError(
                f"The model returned a {type(self._logits).__name__}, but one tensor of logits is needed; "
                "wrap it in a module that returns the logits alone."
            )
        return {OUTPUT_NAME: self._logits.cpu().numpy()}
