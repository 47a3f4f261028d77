"""A CUDA GPU in the CPU's memory: device memory, streams that work when they are synchronised, graphs.

Modelled: addresses are host addresses, aligned as torch's allocator aligns; work put on a stream runs only when the
stream is synchronised, so that a missing synchronisation shows; a graph records work and enqueues it when replayed;
memory that has been freed, or that is no device memory, is refused when work touches it; inputs that change between
enqueue and execution are a race. Not modelled: the default stream, events, several GPUs, concurrency.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import ml_dtypes
import numpy as np
import torch

from compress.errors import InputError
from tests.fakes.machine import Machine

ALIGNMENT = 256  # bytes; TensorRT refuses less, torch gives at least this

_allocations: "weakref.WeakValueDictionary[int, np.ndarray]" = weakref.WeakValueDictionary()
_streams: "weakref.WeakValueDictionary[int, FakeStream]" = weakref.WeakValueDictionary()
_current: list["FakeStream"] = []
_handles = iter(range(1, 2**62))


class Pending(Protocol):
    """Work that has been enqueued: `check` looks for races before anything runs, `run` does the work."""

    def check(self) -> None: ...

    def run(self) -> None: ...


class Work(Protocol):
    """Something that can be enqueued on a stream, and again by each replay of a graph that recorded it."""

    def enqueue(self) -> Pending: ...


class FakeStream:
    """A stream other than the default one; its work is done by `synchronize` and not before."""

    def __init__(self) -> None:
        self.handle = next(_handles)
        self._pending: list[Pending] = []
        self._recording: list[Work] | None = None
        self.broken_capture = False
        _streams[self.handle] = self

    @property
    @contextmanager
    def inside(self) -> Iterator[None]:
        """Makes this the current stream for a `with` block."""
        _current.append(self)
        try:
            yield
        finally:
            _current.pop()

    @property
    def capturing(self) -> bool:
        """Whether a graph is being recorded."""
        return self._recording is not None

    @property
    def idle(self) -> bool:
        """Whether everything enqueued has been done."""
        return not self._pending

    def submit(self, work: Work) -> None:
        """Enqueue work, or record it while a graph is captured."""
        if self._recording is not None:
            self._recording.append(work)
        else:
            self._pending.append(work.enqueue())

    def synchronize(self) -> None:
        """Do everything that was enqueued."""
        if self.capturing:
            self.broken_capture = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        pending, self._pending = self._pending, []
        for work in pending:
            work.check()
        for work in pending:
            work.run()

    def record(self, work: Callable[[], None]) -> list[Work]:
        """What `work` enqueues, without doing it; RuntimeError if part of it cannot be captured."""
        if self.capturing:
            raise RuntimeError("CUDA error: the stream is capturing already")
        recorded: list[Work] = []
        self._recording, self.broken_capture = recorded, False
        try:
            work()
        finally:
            self._recording = None
        if self.broken_capture:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return recorded


def stream_of(handle: int) -> FakeStream:
    """The stream with this handle; RuntimeError if there is none, or it is gone."""
    stream = _streams.get(handle)
    if stream is None:
        raise RuntimeError(f"CUDA error: invalid resource handle: no stream {handle}, or it was garbage-collected")
    return stream


def memory_at(address: int, size_bytes: int) -> np.ndarray:
    """Device memory as bytes that can be read and written; RuntimeError where there is not so much of it."""
    for start, block in list(_allocations.items()):
        offset = address - start
        if offset >= 0 and offset + size_bytes <= block.nbytes:
            return block[offset : offset + size_bytes]
    raise RuntimeError(
        f"CUDA error: an illegal memory access was encountered: {size_bytes} bytes at {address:#x} are no device "
        "memory, or were freed"
    )


class FakeCuda:
    """Stands in for `deploy.runtimes.cuda.CudaDevice`; `machine` is set by `fake_cuda`."""

    memory_error: type[Exception] = torch.OutOfMemoryError
    machine: Machine

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or device.index not in (None, 0):
            raise InputError(f"There is one GPU, cuda:0, not {device}; choose it.")
        self.index = 0
        self.name = self.machine.gpu
        self.compute_capability = self.machine.compute_capability

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the current GPU, which it is anyhow."""
        yield

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Device memory full of ones' bits: NaN, where it holds floating-point numbers."""
        if self.machine.faults.out_of_memory_on_device:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.full(size_bytes + ALIGNMENT, 0xFF, np.uint8)
        # A fresh view owns the registration: torch keeps it alive exactly as long as the tensor's storage.
        start = -raw.ctypes.data % ALIGNMENT
        block = raw[start : start + size_bytes]
        _allocations[block.ctypes.data] = block
        return torch.from_numpy(block).view(dtype).view(tuple(shape))

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Copy to the device; complete on return."""
        self._refuse_in_capture()
        if array.dtype == ml_dtypes.bfloat16:
            host = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            host = torch.from_numpy(np.array(array))
        device = self.empty(array.shape, host.dtype)
        device.copy_(host)
        return device

    def take(self, tensor: torch.Tensor) -> np.ndarray:
        """Copy from the device, after what the current stream has to do; other streams are not waited for."""
        self._refuse_in_capture()
        if _current:
            _current[-1].synchronize()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()

    def stream(self) -> FakeStream:
        """A new stream; whoever uses its handle must keep it."""
        return FakeStream()

    def capture(self, stream: FakeStream, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues on `stream`; the function returned enqueues it on that stream."""
        recorded = stream.record(work)
        if self.machine.faults.fail_capture:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        def replay() -> None:
            for item in recorded:
                stream.submit(item)

        return replay

    def _refuse_in_capture(self) -> None:
        for stream in list(_streams.values()):
            if stream.capturing:
                stream.broken_capture = True
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def fake_cuda(machine: Machine) -> type[FakeCuda]:
    """The class to put in place of CudaDevice."""
    return type("CudaDevice", (FakeCuda,), {"machine": machine})
