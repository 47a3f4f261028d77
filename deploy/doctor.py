"""What this installation can do: versions, devices, what is missing and which extra brings it."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.harness.environment import environment
from deploy.runtimes.ort_providers import installed_tensorrt
from deploy.tensorrt_binding import supported

CORE = ("espalier", "torch", "torchvision", "accelerate", "onnx", "onnxscript", "safetensors", "torch-pruning")
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Extra:
    """A library that some work needs; `extra` of Espalier brings it."""

    library: str
    extra: str
    purpose: str


OPTIONAL = (
    Extra("onnxruntime", "cpu", "verifying and timing ONNX files on the CPU"),
    Extra("onnxruntime-gpu", "gpu", "running ONNX files on an NVIDIA GPU, in place of onnxruntime"),
    Extra("timm", "timm", "models timm:NAME"),
    Extra("nvidia-modelopt", "quant", "writing fp16 and bf16 files"),
    Extra("tensorrt", "tensorrt", "TensorRT engines"),
    Extra("tritonclient", "triton", "Triton model repositories"),
)


def examine() -> dict[str, Any]:
    """Versions, devices, the build of ONNX Runtime, what is missing, and what is wrong; JSON values."""
    versions = {library: _version(library) for library in (*CORE, *(item.library for item in OPTIONAL))}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": _devices(),
        "onnxruntime": _onnxruntime(),
        "missing": [
            {
                "library": item.library,
                "purpose": item.purpose,
                "install": f"pip install 'espalier[{item.extra}]'",
            }
            for item in OPTIONAL
            if versions[item.library] is None
        ],
        "problems": list(_problems(versions)),
    }


def tables(found: dict[str, Any]) -> list[RenderableType]:
    """The outcome of `examine` for the terminal."""
    installed = Table(title="Installed", title_justify="left", box=box.SIMPLE_HEAD)
    installed.add_column("library")
    installed.add_column("version")
    installed.add_row("python", found["python"])
    for library, version in found["versions"].items():
        if version is not None:
            installed.add_row(library, version)
    missing = Table(title="Not installed", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("library", "needed for", "brought by"):
        missing.add_column(header)
    for item in found["missing"]:
        missing.add_row(item["library"], item["purpose"], item["install"])
    devices = Table(title="Devices", title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    for key, value in found["devices"].items():
        devices.add_row(key, str(value) if key != "gpus" else ", ".join(gpu["name"] for gpu in value) or "none")
    if found["onnxruntime"]:
        devices.add_row("onnxruntime", ", ".join(found["onnxruntime"]["providers"]))
    verdict = [f"Problem: {problem}" for problem in found["problems"]] or ["No problem found."]
    return [installed, missing, devices, *verdict]


def _version(library: str) -> str | None:
    if library == "tensorrt":  # it has a distribution for each CUDA, too
        return installed_tensorrt()
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    seen = environment()
    cpu = seen["cpu"]
    return {
        "cpu": cpu["model"],
        "cores": len(cpu["affinity"]),
        "threads": seen["threads"]["torch_intra_op"],
        "memory_bytes": seen["memory"]["total_bytes"],
        "gpus": seen["gpus"],
        "cuda_of_torch": torch.version.cuda,
        "gpu_usable_by_torch": torch.cuda.is_available(),
    }


def _onnxruntime() -> dict[str, Any] | None:
    """What the installed ONNX Runtime was built with; None where it is missing."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return {
        "version": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "build": onnxruntime.get_build_info(),
    }


def _problems(versions: dict[str, str | None]) -> Iterator[str]:
    if versions["espalier"] is None:
        yield "espalier runs from a source tree that is not installed: run pip install -e '.[cpu]'."
    if sys.version_info < OLDEST_PYTHON:
        yield f"Python {platform.python_version()} is too old: use 3.11 or later."
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if versions[name] is not None]
    if len(both) == 2:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: run pip uninstall "
            "onnxruntime onnxruntime-gpu, then install espalier[cpu] or espalier[gpu]."
        )
    tensorrt = versions["tensorrt"]
    if tensorrt is not None and not supported(tensorrt):
        yield (
            f"TensorRT {tensorrt} is installed, which engines are not built with: run pip install 'espalier[tensorrt]'."
        )
    elif tensorrt is not None and versions["onnxruntime-gpu"] is not None and not tensorrt.startswith("10."):
        yield (
            f"TensorRT {tensorrt} is installed, but onnxruntime-gpu links TensorRT 10: its TensorRT provider does not "
            "start beside it; espalier's own engines do."
        )
    if not both:
        yield "no ONNX Runtime is installed, so espalier run cannot begin: run pip install 'espalier[cpu]'."
