"""What counts as right."""

from math import isfinite

import torch
from torch import Tensor, nn

from benchmarks.coverage.zeroing import tensors

PARITY = 1e-4
"""Largest error of removal against zeroing that passes, in float32; a wrong group gives 1e-2 and more."""

RUNTIME = 1e-3
"""Largest error of ONNX Runtime against PyTorch that passes."""


class WrongResultError(Exception):
    """The network computes, but not what it should."""


def run(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """One forward pass in evaluation mode."""
    with torch.no_grad():
        return tensors(model.eval()(inputs))


def finite(error: float) -> float:
    """The error.

    Raises:
        WrongResultError: it is none, since an output was not finite.
    """
    if not isfinite(error):
        raise WrongResultError("the outputs are not finite")
    return error
