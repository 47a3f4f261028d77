"""What ONNX Runtime raises, and what of it is the user's to mend."""

import re
from pathlib import Path

from compress.errors import InputError, first_line


def failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class but Exception, and what its bindings raise besides."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*own, RuntimeError, ValueError)


def reason(error: Exception) -> str:
    """What the message says behind its codes and places in ONNX Runtime's source."""
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing failed."
    # "/onnxruntime_src/…/onnxruntime_pybind_state.cc:729 void onnxruntime::python::Register(…) Please install …"
    return re.sub(r"^/\S+:\d+ [^)]*\) ", "", first_line(error)).rsplit(" : ", 1)[-1]


def not_opened(error: Exception, path: Path, *, provider: str, precision: str | None) -> InputError:
    """The error for a file that `provider` does not open; `precision` where the file says which it is in."""
    kind = type(error).__name__
    if kind in {"InvalidProtobuf", "InvalidGraph", "InvalidArgument"}:
        return InputError(f"{path} is not a readable ONNX file: {reason(error)}; export it again.")
    if kind == "NotImplemented":
        stated = "" if precision is None else f"it is in {precision}, and "
        return InputError(
            f"{path} cannot run on {provider}: {stated}a kernel is missing there ({reason(error)}); "
            "use the file in fp32 or fp16, or another device."
        )
    if kind == "RuntimeError":  # of the bindings, before any file is read
        return InputError(
            f"ONNX Runtime cannot use {provider}: {reason(error)}; check the installation with espalier doctor, "
            "or choose another runtime."
        )
    return InputError(
        f"ONNX Runtime cannot run {path} on {provider}: {reason(error)}; export it again, or choose another device."
    )
