"""One interface for everything that executes a network: `open_runtime(artefact, device=...)`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from compress.errors import InputError
from deploy.runtimes.base import Runtime, Step, TensorSpec
from deploy.runtimes.onnx_runtime import OnnxRuntime
from deploy.runtimes.pytorch import PyTorchRuntime

RUNTIMES: dict[str, Callable[..., Runtime]] = {".onnx": OnnxRuntime}
"""File suffix -> runtime, called as `(path, device=..., threads=...)`; add to it for another kind of file."""

__all__ = ["RUNTIMES", "Runtime", "Step", "TensorSpec", "open_runtime"]


def open_runtime(artefact: Path | nn.Module, *, device: str = "cpu", threads: int | None = None) -> Runtime:
    """Open a file by its suffix, or a module as it is.

    Args:
        artefact: an ONNX file, or a module that maps images (N, C, H, W) to logits (N, classes).
        device: "cpu", "cuda" or "cuda:N"; another device is never substituted.
        threads: CPU threads of one inference; None leaves PyTorch's number, for every runtime.

    Raises:
        InputError: the file is missing, unreadable or of an unknown kind, or the device cannot be used.
        MissingExtraError: the library that executes the file is not installed.
    """
    _check_device(device)
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads were asked for; give at least 1.")
    if isinstance(artefact, nn.Module):
        return PyTorchRuntime(artefact, device=device, threads=threads)
    path = Path(artefact)
    if path.suffix not in RUNTIMES:
        raise InputError(
            f"{path} has the suffix {path.suffix or 'nothing'}, which no runtime executes; "
            f"give a file that ends in {', '.join(RUNTIMES)}."
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; export it first.")
    return RUNTIMES[path.suffix](path, device=device, threads=threads)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f'There is no device "{device}"; give "cpu", "cuda" or "cuda:N".') from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"Device {device} was asked for, but PyTorch finds no CUDA GPU; choose cpu, or check the driver "
            "with espalier doctor."
        )
