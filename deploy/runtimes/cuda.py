"""All of torch.cuda that the TensorRT runtime touches: memory, a stream, CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import ml_dtypes
import numpy as np
import torch

from compress.errors import InputError


class Stream:
    """A stream of its own: CUDA graphs cannot be captured on the default stream, and TensorRT synchronises on it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._inside = torch.cuda.stream(self._stream)

    @property
    def handle(self) -> int:
        """The `cudaStream_t` as a number; never 0, which is the default stream."""
        return int(self._stream.cuda_stream)

    @property
    def inside(self) -> torch.cuda.StreamContext:
        """Makes this the current stream, on its device, for a `with` block; not to be nested."""
        return self._inside

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

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the GPU; complete on return. Raises `memory_error` if there is not enough memory."""
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).to(self._device).view(torch.bfloat16)
        return torch.from_numpy(array).to(self._device)

    def take(self, tensor: torch.Tensor) -> np.ndarray:
        """Copy a tensor from the GPU; complete on return. Whatever writes to it must be done before."""
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return tensor.cpu().numpy()

    def stream(self) -> Stream:
        """A new stream that is not the default one."""
        return Stream(self._device)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues on `stream` as a CUDA graph, without executing it.

        Kernel arguments, addresses among them, are frozen in the graph: what they point at must outlive it.

        Returns:
            A function that enqueues the whole graph on `stream`; it owns the graph.

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

        def replay() -> None:
            with stream.inside:
                graph.replay()

        return replay
