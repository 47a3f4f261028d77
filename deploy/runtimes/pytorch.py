"""The PyTorch runtime: a module as it is, or compiled, in channels-last format, replayed as a CUDA graph."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import InputError, WorkError, first_line
from compress.tasks import prediction
from deploy.runtimes import cuda
from deploy.runtimes.base import Batch, Lane, Runtime
from deploy.runtimes.bfloat16 import to_numpy, to_torch
from deploy.runtimes.compilation import Compiled
from deploy.runtimes.cuda_lane import CudaLane, Tensors, pin
from deploy.tensor_spec import TensorSpec

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

WARM_UP_RUNS = 3
"""When a lane on a GPU is made: libraries choose algorithms and allocate workspaces in the first runs, and those must
not fall into the capture of a CUDA graph."""


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
    """A module from images to logits, or to a dictionary with the logits under "out".

    It is held in eval mode until `close`, which gives it its former mode back.

    PyTorch's number of threads belongs to the process: `threads` sets it for everything else, too. So does TF32, which
    on a GPU is switched off: fp32 is fp32 in every runtime.
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
            channels_last: parameters and images in that memory format; images are brought into it in each query. The
                model given stays as it is: a copy of it runs, which later changes of its weights do not reach.
            cuda_graph: lanes replay a CUDA graph each; `run` computes without one.

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
        if self._device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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

    def _run(self, batch: Batch) -> dict[str, np.ndarray]:
        images = to_torch(batch[INPUT_NAME]).to(self._device)
        self._compile_for(images)
        try:
            return {OUTPUT_NAME: to_numpy(prediction(self._infer(images)))}
        except RuntimeError as error:
            raise _failed(images, error) from error

    def _prepare(self, pool: list[Batch]) -> list[torch.Tensor] | list[Tensors]:
        if self._device.type == "cuda":
            return pin(cuda.CudaDevice(self._device), self.inputs, pool)
        return [to_torch(batch[INPUT_NAME]) for batch in pool]

    def _lane(self, prepared: Any) -> Lane:
        if self._device.type == "cuda":
            return self._cuda_lane(cuda.CudaDevice(self._device), prepared)
        self._compile_for(prepared[0])
        return _CpuLane(self._infer, prepared)

    def _cuda_lane(self, device: cuda.CudaDevice, pool: Sequence[Tensors]) -> CudaLane:
        stream = device.stream()
        images = device.empty(pool[0][0].shape, pool[0][0].dtype)
        try:
            with device.current(), stream.inside:
                stream.copy(images, pool[0][0])
                self._compile_for(images)
                for _ in range(WARM_UP_RUNS):
                    logits = prediction(self._infer(images))
            stream.synchronize()
        except RuntimeError as error:
            raise _failed(images, error) from error
        compute = (
            self._captured(device, stream, images) if self._cuda_graph else lambda: (prediction(self._infer(images)),)
        )
        outputs = {OUTPUT_NAME: device.pinned(logits.shape, logits.dtype)}
        return CudaLane(stream, pool, (images,), compute, outputs, partial(_failed, images))

    def _captured(self, device: cuda.CudaDevice, stream: cuda.Stream, images: torch.Tensor) -> Callable[[], Tensors]:
        """The kernels of one inference, captured once and launched together; images and logits keep their addresses."""
        logits: list[torch.Tensor] = []
        try:
            replay = device.capture(stream, lambda: logits.append(prediction(self._infer(images))))
        except RuntimeError as error:
            raise WorkError(
                f"PyTorch cannot capture the network as a CUDA graph: {first_line(error)}; leave out cuda_graph=true."
            ) from error

        def compute() -> Tensors:
            replay()
            return logits

        return compute

    def _compile_for(self, images: torch.Tensor) -> None:
        if self._compiled is not None:
            self._compiled.prepare(self._formatted(images))

    def _infer(self, images: torch.Tensor) -> Any:
        images = self._formatted(images)  # out of inference mode: what is made inside is compiled for once more
        with torch.inference_mode():
            return self._forward(images)

    def _formatted(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self._channels_last else images


class _CpuLane(Lane):
    """PyTorch allocates its outputs anew in every query; that belongs to what its user waits for."""

    def __init__(self, infer: Callable[[torch.Tensor], Any], pool: Sequence[torch.Tensor]) -> None:
        self.size = len(pool)
        self._infer = infer
        self._pool = pool
        self._threads = torch.get_num_threads()
        self._thread = get_ident()
        self._latest: Any = None

    def query(self, index: int) -> None:
        if self._thread != get_ident():
            torch.set_num_threads(self._threads)  # OpenMP has a number for each thread, at first that of all cores
            self._thread = get_ident()
        try:
            self._latest = self._infer(self._pool[index])
        except RuntimeError as error:
            raise _failed(self._pool[index], error) from error

    def outputs(self) -> dict[str, np.ndarray]:
        return {OUTPUT_NAME: to_numpy(prediction(self._latest))}


def _failed(images: torch.Tensor, error: RuntimeError) -> WorkError:
    return WorkError(f"PyTorch failed on a batch of shape {tuple(images.shape)}: {error}")
