"""All of torch.cuda that lanes on a GPU touch: memory here and there, a stream, events, CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch

from compress.errors import InputError
from deploy.runtimes.bfloat16 import to_numpy, to_torch


class Stream:
    """A stream of its own: CUDA graphs cannot be captured on the default stream, and TensorRT synchronises on it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # on which weights may still be on their way
        self._inside = torch.cuda.stream(self._stream)

    @property
    def handle(self) -> int:
        """The `cudaStream_t` as a number; never 0, which is the default stream."""
        return int(self._stream.cuda_stream)

    @property
    def inside(self) -> torch.cuda.StreamContext:
        """Makes this the current stream, on its device, for a `with` block; not to be nested."""
        return self._inside

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between the GPU and page-locked memory; call it `inside`."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event that happens when everything enqueued so far is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Wait until everything enqueued on the stream is done."""
        self._stream.synchronize()


class CudaDevice:
    """One CUDA GPU.

    Raises:
        InputError: it is no CUDA device, or PyTorch cannot use it.
    """

    memory_error: type[Exception] = torch.OutOfMemoryError

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise InputError(f"TensorRT runs on CUDA GPUs only, not on device {device}; choose cuda or cuda:N.")
        if not torch.cuda.is_available():
            raise InputError(
                f"Device {device} was asked for, but PyTorch finds no CUDA GPU; check the driver with espalier doctor."
            )
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        if self.index >= torch.cuda.device_count():
            raise InputError(
                f"Device {device} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs; "
                "choose one of them, counted from 0."
            )
        self.name = torch.cuda.get_device_name(self.index)
        self.compute_capability: tuple[int, int] = torch.cuda.get_device_capability(self.index)
        self._device = torch.device("cuda", self.index)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the current GPU of the thread for the block: TensorRT builds and enqueues on that one."""
        with torch.cuda.device(self.index):
            yield

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the GPU; raises `memory_error` if there is not enough."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised page-locked memory of the host, which the GPU copies to and from by itself."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def pin(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Copies of arrays of one shape and type in one block of page-locked memory."""
        block = self.pinned((len(arrays), *arrays[0].shape), to_torch(arrays[0]).dtype)
        places = list(block.unbind())
        for place, array in zip(places, arrays, strict=True):
            place.copy_(to_torch(array))
        return places

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the GPU; complete on return. Raises `memory_error` if there is not enough memory."""
        return to_torch(array).to(self._device)

    def take(self, tensor: torch.Tensor) -> np.ndarray:
        """Copy a tensor from the GPU; complete on return. Whatever writes to it must be done before."""
        return to_numpy(tensor)

    def stream(self) -> Stream:
        """A new stream that is not the default one."""
        return Stream(self._device)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues on `stream` as a CUDA graph, without executing it.

        Kernel arguments, addresses among them, are frozen in the graph: what they point at must outlive it.

        Returns:
            A function that enqueues the whole graph on the current stream; it owns the graph.

        Raises:
            RuntimeError: something in `work` cannot be captured, or `work` raised it.
        """
        graph = torch.cuda.CUDAGraph()
        with stream.inside:
            # Other threads may go on allocating: only calls of this one are held to the rules of capturing.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                # The stream must leave capture mode; ending a capture that has failed is an error once more.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay
