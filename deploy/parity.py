"""Whether an artefact computes what the PyTorch model computes, and how accurate the artefact itself is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.training.evaluation import Evaluation, evaluate
from deploy.runtimes import Runtime
from deploy.runtimes.pytorch import PyTorchRuntime

FP32_TOLERANCE = 1e-3
"""Bound on `max_relative_error` in float32: a thousand times what another order of summation causes."""

TIE = 1e-5
"""Two classes tie when their reference logits differ by at most this share of the sample's largest |logit|:
the order is then a matter of rounding, and either class counts as the top one."""


@dataclass(frozen=True)
class BatchParity:
    """Reference logits a (N, classes) against the artefact's b, computed in batches of `batch_size`.

    max_relative_error: max|a − b| / max|a|, both over all N × classes logits; infinite if b is not finite.
    mean_relative_error: mean|a − b| / mean|a|, likewise.
    top1_agreement: percent of the samples whose top class by b is a top class by a; see `TIE`.
    samples: N, the whole batches that the samples filled.
    """

    batch_size: int
    samples: int
    max_relative_error: float
    mean_relative_error: float
    top1_agreement: float


@dataclass(frozen=True)
class Parity:
    """The figures per batch size; overall, the largest of the errors and averages weighted by samples."""

    batches: tuple[BatchParity, ...]

    @property
    def samples(self) -> int:
        """Comparisons made: a sample counts once for each batch size."""
        return sum(batch.samples for batch in self.batches)

    @property
    def max_relative_error(self) -> float:
        return max(batch.max_relative_error for batch in self.batches)

    @property
    def mean_relative_error(self) -> float:
        return sum(batch.mean_relative_error * batch.samples for batch in self.batches) / self.samples

    @property
    def top1_agreement(self) -> float:
        return sum(batch.top1_agreement * batch.samples for batch in self.batches) / self.samples

    def require(self, tolerance: float = FP32_TOLERANCE) -> None:
        """Hold every batch size to `max_relative_error` ≤ tolerance and a top-1 agreement of 100 %.

        Raises:
            WorkError: with the figures of the first batch size that fails.
        """
        for batch in self.batches:
            if batch.max_relative_error <= tolerance and batch.top1_agreement == 100:
                continue
            raise WorkError(
                f"The artefact does not compute what the model does: at batch {batch.batch_size} the largest "
                f"relative error is {batch.max_relative_error:.2g} (tolerance {tolerance:.2g}, mean "
                f"{batch.mean_relative_error:.2g}) and the top class agrees on {batch.top1_agreement:.2f} % "
                f"of {batch.samples} samples; export it again from the same weights, and look for an "
                "operation that depends on the batch or on randomness."
            )


def check_parity(
    reference: nn.Module,
    runtime: Runtime,
    samples: torch.Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 3, 8),
) -> Parity:
    """Compare the logits of `runtime` with those of `reference` in eval mode, at several batch sizes.

    Args:
        samples: real images, normalised, (N, C, H, W); samples that fill no whole batch are left out.

    Raises:
        InputError: fewer samples than the largest batch, or images that the artefact does not take.
        WorkError: the reference's logits are not finite, or the shapes of the logits differ.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(
            f"Parity was asked for at batch sizes {tuple(batch_sizes)}; give at least one, each at least 1."
        )
    largest = max(batch_sizes)
    if len(samples) < largest:
        raise InputError(
            f"Parity at batch {largest} needs at least {largest} samples, but there are {len(samples)}; give more."
        )
    parameter = next(reference.parameters(), torch.empty(0))
    with PyTorchRuntime(reference, device=str(parameter.device)) as original:
        expected = _logits(original, samples, largest, partial=True).astype(np.float64)
    if not np.isfinite(expected).all():
        raise WorkError(
            "The PyTorch model's logits on the parity samples are not finite: its weights or the images hold "
            "NaN or infinite values."
        )
    batches = []
    for size in batch_sizes:
        actual = _logits(runtime, samples, size, partial=False).astype(np.float64)
        batches.append(_compare(expected[: len(actual)], actual, size))
    return Parity(tuple(batches))


def evaluate_runtime(runtime: Runtime, loader: DataLoader, *, description: str = "evaluation") -> Evaluation:
    """Top-1, top-5 and loss of the very artefact over `loader`, by the same code that evaluates models.

    Raises:
        InputError: the loader is empty, or its images do not fit the artefact.
        WorkError: the loss is not finite, or the runtime failed.
    """
    return evaluate(_AsModule(runtime), loader, description=description)


class _AsModule(nn.Module):
    """A runtime in place of a model: images (N, C, H, W) -> logits (N, classes), on the images' device."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(_infer(self._runtime, images)).to(images.device)


def _infer(runtime: Runtime, images: torch.Tensor) -> np.ndarray:
    if len(runtime.inputs) != 1 or len(runtime.outputs) != 1:
        raise InputError(
            f"The artefact has {len(runtime.inputs)} inputs and {len(runtime.outputs)} outputs, but a "
            "classifier has one of each; give one that maps images to logits."
        )
    spec = runtime.inputs[0]
    batch: dict[str, Any] = {spec.name: images.cpu().numpy().astype(spec.dtype, copy=False)}
    return runtime.run(batch)[runtime.outputs[0].name]


def _logits(runtime: Runtime, samples: torch.Tensor, batch_size: int, *, partial: bool) -> np.ndarray:
    """(N, C, H, W) -> (N, classes); without `partial`, of whole batches only."""
    return np.concatenate(
        [_infer(runtime, batch) for batch in samples.split(batch_size) if partial or len(batch) == batch_size]
    )


def _compare(expected: np.ndarray, actual: np.ndarray, batch_size: int) -> BatchParity:
    if expected.shape != actual.shape:
        raise WorkError(
            f"At batch {batch_size} the model gives logits of shape {expected.shape} and the artefact "
            f"{actual.shape}: they are not of one network; export it again."
        )
    difference = np.abs(expected - actual)
    finite = bool(np.isfinite(actual).all())
    return BatchParity(
        batch_size=batch_size,
        samples=len(expected),
        max_relative_error=_ratio(difference.max(), np.abs(expected).max()) if finite else np.inf,
        mean_relative_error=_ratio(difference.mean(), np.abs(expected).mean()) if finite else np.inf,
        top1_agreement=top1_agreement(expected, actual),
    )


def top1_agreement(expected: np.ndarray, actual: np.ndarray) -> float:
    """Percent of the rows whose largest element in `actual` is a largest one in `expected`, up to a `TIE`.

    A row of `actual` with NaN or infinity agrees with nothing.
    """
    rows = np.arange(len(expected))
    chosen = expected[rows, actual.argmax(axis=1)]
    margin = TIE * np.abs(expected).max(axis=1)
    agrees = (expected.max(axis=1) - chosen <= margin) & np.isfinite(actual).all(axis=1)
    return float(100 * agrees.mean())


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / scale)
