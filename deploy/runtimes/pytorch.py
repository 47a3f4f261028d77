"""The PyTorch runtime: a module as it is, or compiled, in channels-last format, replayed as a CUDA graph."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import InputError, WorkError, first_line
from deploy.runtimes.base import Runtime, Step
from deploy.runtimes.bfloat16 import to_numpy, to_torch
from deploy.runtimes.compilation import Compiled
from deploy.tensor_spec import TensorSpec

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

WARM_UP_RUNS = 3
"""Before a CUDA graph is captured: libraries choose algorithms and allocate workspaces in the first runs."""


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

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str = "cpu",
        threads: int | None = None,
        compile: bool = False,
        channels_last: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """
        Args:
            compile: by torch.compile, the whole network and each shape by itself; a graph break is an error.
            channels_last: parameters and images in that memory format. The model given stays as it is: a copy of it
                runs, which later changes of its weights do not reach.
            cuda_graph: bound steps replay a CUDA graph; `run` computes without one.

        Raises:
            InputError: the model is on another device, or a CUDA graph is asked for on the CPU.
        """
        self._device = torch.device(device)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if tensor.device.type != self._device.type:
                raise InputError(
                    f"The model's {name} is on {tensor.device}, not on {device} as asked; "
                    f'move it with model.to("{device}").'
                )
        if cuda_graph and self._device.type != "cuda":
            raise InputError(
                f"pytorch:cuda_graph=true needs a CUDA GPU, but the device asked for is {device}; "
                "leave it out or choose device cuda."
            )
        if threads is not None:
            torch.set_num_threads(threads)
        floating = [tensor.dtype for _, tensor in tensors if tensor.is_floating_point()]
        dtype = str(floating[0] if floating else torch.float32).removeprefix("torch.")
        self.inputs = (TensorSpec(INPUT_NAME, dtype, ("batch", None, None, None)),)
        self.outputs = (TensorSpec(OUTPUT_NAME, dtype, ("batch", None)),)
        self._channels_last = channels_last
        self._cuda_graph = cuda_graph
        if channels_last:
            # Not the module itself: another runtime may hold it at the same time, in the usual format.
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self._modes = ExitStack()
        self._modes.enter_context(evaluating(model))
        self._compiled = Compiled(model) if compile else None
        self._forward: Callable[[torch.Tensor], Any] = model if self._compiled is None else self._compiled.forward

    def close(self) -> None:
        self._modes.close()
        super().close()

    def description(self) -> dict[str, Any]:
        """As for every runtime; `compiled_graphs` counts the graphs that were compiled, one for each shape."""
        found = {
            "runtime": "pytorch",
            "version": torch.__version__,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "compile": self._compiled is not None,
            "channels_last": self._channels_last,
            "cuda_graph": self._cuda_graph,
        }
        return found if self._compiled is None else found | {"compiled_graphs": self._compiled.graphs}

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step = self._step(batch)
        step()
        return step.outputs()

    def _bind(self, batch: dict[str, np.ndarray]) -> Step:
        step = self._step(batch)
        return _GraphStep(step) if self._cuda_graph else step

    def _step(self, batch: dict[str, np.ndarray]) -> "_PyTorchStep":
        images = to_torch(batch[INPUT_NAME]).to(self._device)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self._compiled is not None:
            self._compiled.prepare(images)
        return _PyTorchStep(self._forward, images)


class _PyTorchStep(Step):
    """PyTorch allocates its outputs anew in every call; that belongs to what its user waits for."""

    def __init__(self, forward: Callable[[torch.Tensor], Any], images: torch.Tensor) -> None:
        self.forward = forward
        self.images = images
        self.logits: Any = None

    def __call__(self) -> None:
        try:
            with torch.inference_mode():
                self.logits = self.forward(self.images)
            if self.images.is_cuda:
                torch.cuda.synchronize(self.images.device)
        except RuntimeError as error:
            shape = tuple(self.images.shape)
            raise WorkError(f"PyTorch failed on a batch of shape {shape}: {error}") from error

    def outputs(self) -> dict[str, np.ndarray]:
        if not isinstance(self.logits, torch.Tensor):
            raise InputError(
                f"The model returned a {type(self.logits).__name__}, but one tensor of logits is needed; "
                "wrap it in a module that returns the logits alone."
            )
        return {OUTPUT_NAME: to_numpy(self.logits)}


class _GraphStep(Step):
    """The kernels of one inference, captured once and launched together; images and logits keep their addresses."""

    def __init__(self, step: _PyTorchStep) -> None:
        self._step = step
        self._device = step.images.device
        try:
            with torch.cuda.device(self._device):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP_RUNS):
                        step()
                torch.cuda.current_stream().wait_stream(side)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph), torch.inference_mode():
                    step.logits = step.forward(step.images)
        except RuntimeError as error:
            raise WorkError(
                f"PyTorch cannot capture the network as a CUDA graph: {first_line(error)}; leave out cuda_graph=true."
            ) from error

    def __call__(self) -> None:
        try:
            self._graph.replay()
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            raise WorkError(f"The CUDA graph of the network failed: {first_line(error)}.") from error

    def outputs(self) -> dict[str, np.ndarray]:
        return self._step.outputs()
