"""Whether an artefact computes what the PyTorch model computes, and how accurate the artefact itself is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.tasks import CLASSIFICATION, Evaluation, Task
from compress.training.evaluation import evaluate
from deploy.runtimes import Runtime
from deploy.runtimes.pytorch import PyTorchRuntime
from deploy.tolerance import TIE, TOLERANCES, Tolerance


@dataclass(frozen=True)
class BatchParity:
    """Reference logits a (N, classes) against the artefact's b, computed in batches of `batch_size`.

    Of logits for pixels, (N, classes, H, W), every pixel counts, and its scale is the largest |a| of its whole image.

    max_relative_error: max|a − b| / max|a|, both over all N × classes logits; infinite if b is not finite.
    mean_relative_error: mean|a − b| / mean|a|, likewise.
    rms_relative_error: √(Σ(a − b)² / Σa²), likewise.
    top1_agreement: percent of the samples, or pixels, whose top class by b is a top class by a; see `TIE`.
    largest_flip: how far the class that b puts first lies below the top in a, as a share of the sample's largest |a|;
        of the worst sample. 0 if all agree, at most 2, infinite if b is not finite.
    samples: N, the whole batches that the samples filled.
    """

    batch_size: int
    samples: int
    max_relative_error: float
    mean_relative_error: float
    rms_relative_error: float
    top1_agreement: float
    largest_flip: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, 10 log10(Σa² / Σ(a − b)²), in dB; infinite where nothing differs."""
        return _decibels(self.rms_relative_error)


@dataclass(frozen=True)
class Parity:
    """The figures per batch size; overall, the largest of the errors and averages weighted by samples."""

    batches: tuple[BatchParity, ...]
    per_pixel: bool = False

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
    def rms_relative_error(self) -> float:
        return max(batch.rms_relative_error for batch in self.batches)

    @property
    def sqnr_db(self) -> float:
        return _decibels(self.rms_relative_error)

    @property
    def largest_flip(self) -> float:
        return max(batch.largest_flip for batch in self.batches)

    @property
    def top1_agreement(self) -> float:
        return sum(batch.top1_agreement * batch.samples for batch in self.batches) / self.samples

    def applied(self, tolerance: Tolerance) -> Tolerance:
        """The tolerance as these outputs are held to it.

        Of millions of pixels some lie on the border of two classes, where any rounding flips them: the classes of a
        pixel are held to what the errors of its logits allow, as those of images are in half precision.
        """
        if not self.per_pixel or tolerance.max_relative_error is None:
            return tolerance
        return replace(tolerance, largest_flip=max(tolerance.largest_flip, 2 * tolerance.max_relative_error))

    def require(self, tolerance: Tolerance | float = TOLERANCES["fp32"]) -> None:
        """Hold every batch size to the tolerance; a number stands for that of fp32 with this `max_relative_error`.

        Raises:
            WorkError: with the figures of the first batch size that fails.
        """
        if not isinstance(tolerance, Tolerance):
            tolerance = replace(TOLERANCES["fp32"], max_relative_error=tolerance)
        tolerance = self.applied(tolerance)
        of = "the pixels of " if self.per_pixel else ""
        for batch in self.batches:
            excess = _excess(batch, tolerance)
            if excess is None:
                continue
            raise WorkError(
                f"The artefact does not compute what the model does: at batch {batch.batch_size} {excess} and the top "
                f"class agrees on {batch.top1_agreement:.2f} % of {of}{batch.samples} samples; export it again from "
                "the same weights, find the first layer that diverges with espalier compare --first-layer, and look "
                "for an operation that depends on the batch or on randomness."
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
        expected = logits(original, samples, largest)
    if not np.isfinite(expected).all():
        raise WorkError(
            "The PyTorch model's logits on the parity samples are not finite: its weights or the images hold "
            "NaN or infinite values."
        )
    batches = []
    for size in batch_sizes:
        errors = _Errors(size)
        for first in range(0, len(samples) - size + 1, size):  # whole batches; logits of pixels are too many to keep
            chosen = slice(first, first + size)
            errors.add(expected[chosen], _infer(runtime, samples[chosen]))
        batches.append(errors.parity())
    return Parity(tuple(batches), per_pixel=expected.ndim > 2)


def evaluate_runtime(
    runtime: Runtime, loader: DataLoader, *, task: Task = CLASSIFICATION, description: str = "evaluation"
) -> Evaluation:
    """Accuracy and loss of the very artefact over `loader`, by the same code that evaluates models.

    Raises:
        InputError: the loader is empty, or its images do not fit the artefact.
        WorkError: the loss is not finite, or the runtime failed.
    """
    return evaluate(_AsModule(runtime), loader, task=task, description=description)


def logits(runtime: Runtime, samples: torch.Tensor, batch_size: int) -> np.ndarray:
    """(N, C, H, W) -> (N, classes) or (N, classes, H, W), computed in batches.

    Raises:
        InputError: the artefact is no classifier, or does not take the samples.
        WorkError: the runtime failed.
    """
    return np.concatenate([_infer(runtime, batch) for batch in samples.split(batch_size)])


class _AsModule(nn.Module):
    """A runtime in place of a model: images (N, C, H, W) -> logits (N, classes, …), on the images' device."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        parts = images.split(self._runtime.largest_batch or len(images))
        logits = np.concatenate([_infer(self._runtime, part) for part in parts])
        return torch.from_numpy(logits.astype(np.float32, copy=False)).to(images.device)


def _infer(runtime: Runtime, images: torch.Tensor) -> np.ndarray:
    if len(runtime.inputs) != 1 or len(runtime.outputs) != 1:
        raise InputError(
            f"The artefact has {len(runtime.inputs)} inputs and {len(runtime.outputs)} outputs, but a "
            "classifier has one of each; give one that maps images to logits."
        )
    spec = runtime.inputs[0]
    batch: dict[str, Any] = {spec.name: images.cpu().numpy().astype(spec.dtype, copy=False)}
    return runtime.run(batch)[runtime.outputs[0].name]


class _Errors:
    """The sums and largest values that make a `BatchParity`, over one batch after the other."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._samples = 0
        self._largest = np.zeros(3)  # |a − b|, |a|, flip
        self._sums = np.zeros(6)  # |a − b|, |a|, (a − b)², a², agreements, rows or pixels
        self._finite = True

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Take in reference logits a and the artefact's b, both (N, classes, …)."""
        if expected.shape != actual.shape:
            raise WorkError(
                f"At batch {self._batch_size} the model gives logits of shape {expected.shape} and the artefact "
                f"{actual.shape}: they are not of one network; export it again."
            )
        expected, actual = expected.astype(np.float64), actual.astype(np.float64)
        self._samples += len(expected)
        self._finite = self._finite and bool(np.isfinite(actual).all())
        flips = _flips(expected, actual)
        difference, size = np.abs(expected - actual), np.abs(expected)
        self._largest = np.maximum(self._largest, [difference.max(), size.max(), flips.max()])
        squares = (np.square(difference).sum(), np.square(size).sum())
        self._sums += [difference.sum(), size.sum(), *squares, (flips <= TIE).sum(), flips.size]

    def parity(self) -> BatchParity:
        """The figures of all that was taken in."""
        error, scale, flip = map(float, self._largest)
        errors, scales, error_squares, squares, agreed, rows = map(float, self._sums)
        rms = _ratio(math.sqrt(error_squares), math.sqrt(squares)) if self._finite else math.inf
        return BatchParity(
            batch_size=self._batch_size,
            samples=self._samples,
            max_relative_error=_ratio(error, scale) if self._finite else math.inf,
            mean_relative_error=_ratio(errors, scales) if self._finite else math.inf,
            rms_relative_error=rms,
            top1_agreement=100 * agreed / rows,
            largest_flip=flip,
        )


def _excess(batch: BatchParity, tolerance: Tolerance) -> str | None:
    """The first bound that the figures break; None if they keep all."""
    limit, floor, flip = tolerance.max_relative_error, tolerance.sqnr_db, tolerance.largest_flip
    if limit is not None and not batch.max_relative_error <= limit:
        mean = batch.mean_relative_error
        return f"the largest relative error is {batch.max_relative_error:.2g} (tolerance {limit:.2g}, mean {mean:.2g})"
    if floor is not None and not batch.sqnr_db >= floor:
        return f"the signal is {batch.sqnr_db:.1f} dB above the noise (tolerance {floor:.1f} dB)"
    if not batch.largest_flip <= flip:
        return (
            f"a class comes first that the model puts {batch.largest_flip:.2g} of the largest logit below its own "
            f"(tolerance {flip:.2g})"
        )
    return None


def _decibels(relative_error: float) -> float:
    """A root mean square error relative to the signal, as signal over noise in dB; infinite for 0."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


def _flips(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """`BatchParity.largest_flip` of each row, or pixel: (N, classes, …) twice -> (N, …).

    A row of `actual` with NaN or infinity agrees with nothing.
    """
    chosen = np.take_along_axis(expected, actual.argmax(axis=1, keepdims=True), axis=1)[:, 0]
    lost = expected.max(axis=1) - chosen
    scale = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True)[:, 0]
    flips = np.divide(lost, scale, out=np.zeros_like(lost), where=np.broadcast_to(scale > 0, lost.shape))
    return np.where(np.isfinite(actual).all(axis=1), flips, np.inf)


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / scale)
