"""What both the building and the running side use: shapes, host memory, callbacks into Python, and error reports."""

import sys
from collections.abc import Mapping, Sequence
from inspect import isfunction
from typing import Any, ClassVar

from tests.fakes.classes import Api, Borrowed, Model

# The numbers that TensorRT prints in messages, the same in both majors (NvInferRuntimeBase.h, ErrorCode).
PRINTED_CODES = {
    "UNSPECIFIED_ERROR": 1,
    "INTERNAL_ERROR": 2,
    "INVALID_ARGUMENT": 3,
    "INVALID_CONFIG": 4,
    "FAILED_ALLOCATION": 5,
    "FAILED_INITIALIZATION": 6,
    "FAILED_EXECUTION": 7,
    "FAILED_COMPUTATION": 8,
    "INVALID_STATE": 9,
    "UNSUPPORTED_STATE": 10,
}


class Callback(Borrowed):
    """An object of a Python subclass that TensorRT calls; it must implement all of its interface."""

    def __set__(self, model: Model, handle: Any) -> None:
        if handle is not None:
            behind = model.api.model(handle)
            for name, method in vars(model.api.classes[behind.public]).items():
                virtual = isfunction(method) and not name.startswith("_") and not hasattr(behind, name)
                if virtual and getattr(type(handle), name) is method:
                    raise RuntimeError(f'Tried to call pure virtual function "{behind.public}::{name}"')
        super().__set__(model, handle)


class Reporting(Model):
    """An object that reports errors: to the nearest error recorder, and to the logger in any case."""

    def report(self, code: str, where: str, text: str, *, label: str = "API Usage Error") -> None:
        """Report an error in TensorRT's form, as in `IRuntime::deserializeCudaEngine: Error Code 6: … (text)`."""
        message = f"{where}: Error Code {PRINTED_CODES[code]}: {label} ({text})"
        recorder = self._nearest("error_recorder")
        if recorder is not None:
            call(recorder, "report_error", bool, getattr(self.api.enums["ErrorCodeTRT"], code), message)
        self.log("ERROR", message)

    def report_out_of_memory(self, where: str, size_bytes: int) -> None:
        """As TensorRT does: it has a code for failed allocations, but reports others, and the text says it."""
        self.report("UNSPECIFIED_ERROR", "[defaultAllocator.cpp::allocate::60]", "out of memory", label="Cuda Runtime")
        self.log("WARNING", f"Requested amount of GPU memory ({size_bytes} bytes) could not be allocated.")
        self.report("INTERNAL_ERROR", where, f"Requested size was {size_bytes} bytes.", label="OutOfMemory")

    def log(self, severity: str, message: str) -> None:
        """Pass a message to the logger."""
        logger = self._nearest("logger")
        assert logger is not None
        call(logger, "log", None, getattr(self.api.enums["Severity"], severity), message)

    def _nearest(self, name: str) -> Any:
        model: Model | None = self
        while model is not None:
            if (found := getattr(model, name, None)) is not None:
                return found
            model = model.parent
        return None


def call(handle: Any, name: str, returns: type | None, *arguments: Any) -> Any:
    """Call a method of a Python subclass from TensorRT's side.

    TensorRT swallows exceptions of such methods and prints them on stderr. The fake does so with what interrupts
    (KeyboardInterrupt), and raises RuntimeError for the rest, which would go unseen.

    Returns:
        What the method returned, of type `returns` where one is given; None if it was interrupted.
    """
    try:
        result = getattr(handle, name)(*arguments)
    except Exception as error:
        raise RuntimeError(f"{type(handle).__name__}.{name} raised, which TensorRT would swallow") from error
    except BaseException as error:  # noqa: BLE001
        print(f"[ERROR] Exception caught in {name}(): {error!r}", file=sys.stderr)  # noqa: T201
        return None
    if returns is not None and not isinstance(result, returns):
        raise RuntimeError(f"{type(handle).__name__}.{name} returned {result!r}, but {returns.__name__} is wanted")
    return result


class ErrorReporter(Reporting):
    """An object with an error recorder of its own."""

    settable: ClassVar[Mapping[str, str]] = {"error_recorder": "IErrorRecorder | None"}
    error_recorder = Callback("the error recorder")


class Interface(Model):
    """A class that users subclass; its own methods are pure virtual."""


class ILogger(Interface):
    public = "ILogger"


class Logger(ILogger):
    public = "Logger"
    settable: ClassVar[Mapping[str, str]] = {"min_severity": "Severity"}

    def __init__(self, api: Api, min_severity: Any) -> None:
        super().__init__(api)
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        """On stdout, where `min_severity` lets it through; severities are ordered as they are declared."""
        order = list(self.api.enums["Severity"].__members__)
        if order.index(severity.name) <= order.index(self.min_severity.name):
            print(f"[TRT] [{severity.name}] {msg}")  # noqa: T201


class IErrorRecorder(Interface):
    public = "IErrorRecorder"


class IProgressMonitor(Interface):
    public = "IProgressMonitor"


class IProfiler(Interface):
    public = "IProfiler"


class Profiler(IProfiler):
    public = "Profiler"

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        print(f"{layer_name}: {ms}ms")  # noqa: T201


class Dims(Model):
    public = "Dims"
    special = ("__len__", "__getitem__", "__eq__", "__str__", "__repr__")

    def __init__(self, api: Api, shape: Sequence[int] = ()) -> None:
        super().__init__(api)
        if len(shape) > 8:
            raise ValueError(f"Input length {len(shape)}. Max expected length is 8")
        self.sizes = tuple(shape)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int | slice) -> Any:
        return self.sizes[index]

    def __eq__(self, other: object) -> bool:
        """Equal to a tuple or list of the same numbers; TensorRT compares two Dims by identity, so that is refused."""
        if not isinstance(other, tuple | list):
            raise TypeError("a Dims equals tuples and lists only: compare tuple(dims)")
        return self.sizes == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(self.sizes)


class HostMemory(Model):
    """Bytes that TensorRT owns."""

    public = "IHostMemory"

    def __init__(self, api: Api, data: bytes) -> None:
        super().__init__(api)
        self.data = data

    @property
    def dtype(self) -> Any:
        return self.api.enums["DataType"].INT8

    @property
    def nbytes(self) -> int:
        return len(self.data)


MODELS: tuple[type[Model], ...] = (
    ILogger,
    Logger,
    IErrorRecorder,
    IProgressMonitor,
    IProfiler,
    Profiler,
    Dims,
    HostMemory,
)
