"""A CUDA GPU in the CPU's memory: device memory, streams that work when they are synchronised, graphs.

Modelled: addresses are host addresses, aligned as torch's allocator aligns; work put on a stream runs only when the
stream is synchronised, so that a missing synchronisation shows; a graph records work and enqueues it when replayed;
memory that has been freed, or that is no device memory, is refused when work touches it, and so is a copy from or to
memory of the host that is not page-locked; what is copied or read and changes between enqueue and execution is a race;
events are known only when the stream has come to them. Not modelled: the default stream, several GPUs, concurrency.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from compress.errors import InputError
from deploy.runtimes.bfloat16 import to_numpy, to_torch
from tests.fakes.machine import Machine

ALIGNMENT = 256  # bytes; TensorRT refuses less, torch gives at least this

_allocations: "weakref.WeakValueDictionary[int, np.ndarray]" = weakref.WeakValueDictionary()
_page_locked: "weakref.WeakValueDictionary[int, np.ndarray]" = weakref.WeakValueDictionary()
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

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between device memory and page-locked memory; this must be the current stream."""
        self._require_current()
        self.submit(Copy(target, source))

    def mark(self) -> "FakeEvent":
        """An event that happens when everything enqueued so far is done."""
        event = FakeEvent()
        self.submit(event)
        return event

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

    def _require_current(self) -> None:
        if not _current or _current[-1] is not self:
            raise RuntimeError("the work would go to another stream: call it inside this one")

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


class FakeEvent:
    """Happens when the stream comes to it; one happens ten microseconds after the other."""

    _count = 0

    def __init__(self) -> None:
        self._moment: int | None = None

    def enqueue(self) -> "FakeEvent":
        return self

    def check(self) -> None: ...

    def run(self) -> None:
        FakeEvent._count += 1
        self._moment = FakeEvent._count

    def elapsed_time(self, end_event: "FakeEvent") -> float:
        """Milliseconds between two events that have happened."""
        if self._moment is None or end_event._moment is None:
            raise RuntimeError("CUDA error: device not ready: an event has not happened yet")
        return 0.01 * (end_event._moment - self._moment)


class Copy:
    """A copy of one tensor to another of its shape and type, one on the device and one in page-locked memory."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.shape != source.shape or target.dtype != source.dtype:
            raise RuntimeError(f"a copy of {source.dtype} {source.shape} to {target.dtype} {target.shape}")
        on_device = [_lies_in(_allocations, tensor) for tensor in (target, source)]
        page_locked = [_lies_in(_page_locked, tensor) for tensor in (target, source)]
        if sorted(on_device) != [False, True] or sorted(page_locked) != [False, True]:
            raise RuntimeError(
                f"a copy to and from device memory {on_device} and page-locked memory {page_locked}: "
                "one of each is needed"
            )
        self.target, self.source = target, source

    def enqueue(self) -> "_Copying":
        return _Copying(self)


class _Copying:
    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._given = _bytes(copy.source).clone()

    def check(self) -> None:
        if not torch.equal(_bytes(self._copy.source), self._given):
            raise RuntimeError("race: what is copied was changed between enqueue and execution")

    def run(self) -> None:
        self._copy.target.copy_(self._copy.source)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _lies_in(memory: "weakref.WeakValueDictionary[int, np.ndarray]", tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    return any(start <= address < start + max(block.nbytes, 1) for start, block in list(memory.items()))


def _memory(
    registry: "weakref.WeakValueDictionary[int, np.ndarray]", shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Memory full of ones' bits, NaN where it holds floating-point numbers; known until it is freed."""
    size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.full(size_bytes + ALIGNMENT, 0xFF, np.uint8)
    # A fresh view owns the registration: torch keeps it alive exactly as long as the tensor's storage.
    start = -raw.ctypes.data % ALIGNMENT
    block = raw[start : start + size_bytes]
    registry[block.ctypes.data] = block
    return torch.from_numpy(block).view(dtype).view(tuple(shape))


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
        return _memory(_allocations, shape, dtype)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory of the host."""
        self._refuse_in_capture()
        return _memory(_page_locked, shape, dtype)

    def pin(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Copies of arrays of one shape and type in one block of page-locked memory."""
        block = self.pinned((len(arrays), *arrays[0].shape), to_torch(arrays[0]).dtype)
        for place, array in zip(block, arrays, strict=True):
            place.copy_(to_torch(array))
        return list(block)

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Copy to the device; complete on return."""
        self._refuse_in_capture()
        host = to_torch(array)
        device = self.empty(array.shape, host.dtype)
        device.copy_(host)
        return device

    def take(self, tensor: torch.Tensor) -> np.ndarray:
        """Copy from the device, after what the current stream has to do; other streams are not waited for."""
        self._refuse_in_capture()
        if _current:
            _current[-1].synchronize()
        return to_numpy(tensor).copy()

    def stream(self) -> FakeStream:
        """A new stream; whoever uses its handle must keep it."""
        return FakeStream()

    def capture(self, stream: FakeStream, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues on `stream`; the function returned enqueues it, inside that stream."""
        with stream.inside:
            recorded = stream.record(work)
        if self.machine.faults.fail_capture:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        def replay() -> None:
            stream._require_current()
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
