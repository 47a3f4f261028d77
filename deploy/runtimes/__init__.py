"""One interface for everything that executes a network: `open_runtime(artefact, device=...)`.

The libraries that execute are imported when something is opened in them: an ONNX file on the CPU goes without PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import InputError
from compress.options_text import read_options
from deploy.runtimes.base import Lane, Runtime
from deploy.runtimes.device import check_device, parse_device
from deploy.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RUNTIMES", "Kind", "Lane", "Runtime", "TensorSpec", "check_device", "open_runtime"]


MOST_THREADS = 1024
"""CPU threads of one inference; far more only take memory and time to start."""


@dataclass(frozen=True)
class Kind:
    """A runtime that can be chosen by name."""

    open: Callable[..., Runtime]
    """Called as `(artefact, request, **options)` with those options that the text gives."""
    suffix: str | None
    """Of the files that it executes; None for modules."""
    options: Mapping[str, Any]
    """Option -> its default; the text's value takes the type of the default."""


@dataclass(frozen=True)
class Request:
    """What `open_runtime` was asked for, checked, whatever the runtime."""

    device: str
    threads: int | None
    trusted_manifest: Path | None
    for_verification: bool


def _pytorch(artefact: "nn.Module", request: Request, **options: Any) -> Runtime:
    from deploy.runtimes.pytorch import PyTorchRuntime

    return PyTorchRuntime(artefact, device=request.device, threads=request.threads, **options)


def _onnxruntime(artefact: Path, request: Request, **options: Any) -> Runtime:
    from deploy.runtimes.onnx_runtime import OnnxRuntime

    return OnnxRuntime(
        artefact,
        device=request.device,
        threads=request.threads,
        for_verification=request.for_verification,
        **options,
    )


def _tensorrt(artefact: Path, request: Request, **options: Any) -> Runtime:
    if parse_device(request.device).type != "cuda":
        raise InputError(
            f"{artefact} is a TensorRT engine, which runs on the NVIDIA GPU that it was built for, but the device "
            f"asked for is {request.device}; choose device cuda, or the ONNX file that the engine was built from."
        )
    from deploy.runtimes.tensorrt import TensorRtRuntime

    return TensorRtRuntime(artefact, device=request.device, trusted_manifest=request.trusted_manifest, **options)


RUNTIMES: dict[str, Kind] = {
    "pytorch": Kind(_pytorch, None, {"compile": False, "channels_last": False, "cuda_graph": False}),
    "onnxruntime": Kind(_onnxruntime, ".onnx", {"provider": "cpu", "cuda_graph": False, "allow_fallback": False}),
    "tensorrt": Kind(_tensorrt, ".plan", {"cuda_graph": True}),
}
"""Name -> runtime; the first one that executes files of a suffix is the default for them."""


def open_runtime(
    artefact: "Path | nn.Module",
    *,
    device: str = "cpu",
    threads: int | None = None,
    runtime: str | None = None,
    trusted_manifest: Path | None = None,
    for_verification: bool = False,
) -> Runtime:
    """Open a file or a module in the runtime that `runtime` names.

    Args:
        artefact: an ONNX file, a TensorRT engine, or a module that maps images (N, C, H, W) to logits (N, classes).
        device: "cpu", "cuda" or "cuda:N"; another device is never substituted.
        threads: CPU threads of one inference; None leaves PyTorch's number, for every runtime.
        runtime: NAME or NAME:option=value:option=value; None chooses by the artefact, without options.
            pytorch: compile, channels_last, cuda_graph;
            onnxruntime: provider (cpu, cuda or tensorrt; by default the one of the device's name), cuda_graph,
            allow_fallback;
            tensorrt: cuda_graph, which is on unless set to false.
        trusted_manifest: a manifest that the user trusts, for an engine that was not built here.
        for_verification: lets ONNX Runtime execute on the CPU what was quantised for GPUs, for its numbers alone:
            values are rounded where the file says so and computed in fp32. The runtime then gives no `lane`,
            because a time would mislead, and `description` says `numbers_only`. It changes nothing for other files.

    Raises:
        InputError: the file is missing, unreadable, of an unknown kind or made for other hardware, or the runtime,
            an option or the device cannot be used.
        MissingExtraError: the library that executes the file is not installed.
        WorkError: a node would run elsewhere than on the provider asked for.
    """
    check_device(device)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"{threads} threads were asked for; give at least 1 and at most {MOST_THREADS}.")
    if isinstance(artefact, str):
        artefact = Path(artefact)
    suffix = artefact.suffix if isinstance(artefact, Path) else None
    what = "A module" if suffix is None else str(artefact)
    name, options = (_default(suffix, what), {}) if runtime is None else _read(runtime)
    kind = RUNTIMES[name]
    if kind.suffix != suffix:
        executes = "modules" if kind.suffix is None else f"{kind.suffix} files"
        raise InputError(f"{what} cannot be opened in {name}, which executes {executes}; choose another runtime.")
    if isinstance(artefact, Path) and not artefact.is_file():
        raise InputError(f"{artefact} does not exist or is not a file; export it first.")
    if trusted_manifest is not None and suffix != ".plan":
        raise InputError(
            f"A trusted manifest was given, but only TensorRT engines (.plan) need one, not {name}; leave it out."
        )
    return kind.open(artefact, Request(device, threads, trusted_manifest, for_verification), **options)


def _default(suffix: str | None, what: str) -> str:
    for name, kind in RUNTIMES.items():
        if kind.suffix == suffix:
            return name
    known = ", ".join(sorted({kind.suffix for kind in RUNTIMES.values() if kind.suffix is not None}))
    raise InputError(f"{what} has the suffix {suffix or 'nothing'}, which no runtime executes; give one of {known}.")


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME:option=value` -> the name and its options."""
    name, *parts = text.split(":")
    if name not in RUNTIMES:
        raise InputError(f"There is no runtime {name!r}; choose one of {', '.join(RUNTIMES)}.")
    return name, read_options(name, parts, RUNTIMES[name].options)
