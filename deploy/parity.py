"""Whether an artefact computes what the PyTorch model computes, and how accurate the artefact itself is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.training.evaluation import Evaluation, evaluate
from deploy.precision import Precision
from deploy.runtimes import Runtime
from deploy.runtimes.pytorch import PyTorchRuntime

TIE: Final = 1e-5
"""Two classes tie when their reference logits differ by at most this share of the sample's largest |logit|:
the order is then a matter of rounding, and either class counts as the top one."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the errors of `BatchParity`; None sets no bound."""

    largest_flip: float
    max_relative_error: float | None = None
    sqnr_db: float | None = None
    """At least this much."""


def _floating_point(significand_bits: int) -> Tolerance:
    """The errors that a thousand roundings in sequence leave.

    Rounding to p bits of significand moves a value by at most u = 2^-p of itself. Errors of n roundings that are
    independent add up like √n (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4), and √1024 = 32; two
    roundings a layer, of weights and of activations, leave room for 500 layers. Errors of two logits together can flip
    classes that are twice as far apart.
    """
    bound = 32 * 2.0**-significand_bits
    return Tolerance(max_relative_error=bound, largest_flip=2 * bound)


def _quantised(one_rounding_db: float) -> Tolerance:
    """The noise that a hundred roundings in sequence leave, 20 dB above that of one, with 3 dB to spare.

    Independent noises add up in power. Outliers that the calibration clips make the largest error meaningless, so none
    is set. Two logits, each off by the noise, can flip classes that are twice as far apart.
    """
    bound = one_rounding_db - 20 - 3
    return Tolerance(sqnr_db=bound, largest_flip=2 * 10 ** (-bound / 20))


TOLERANCES: Final[Mapping[Precision, Tolerance]] = {
    # A thousand times what another order of summation causes.
    "fp32": Tolerance(max_relative_error=1e-3, largest_flip=TIE),
    "fp16": _floating_point(11),
    "bf16": _floating_point(8),
    # 256 steps of Δ over twice the largest value, noise Δ²/12, a largest value ten times the root mean square:
    # 10 log10(12 · 128² / 10²) = 33 dB.
    "int8": _quantised(33),
    # E4M3 has 4 bits of significand: steps of 2^-3 of the power of two below a value, noise 2^-6/12 of its square.
    # For values even over a binade 10 log10(12 · 2^6 · 7/3) = 32.5 dB, for normally distributed ones 31.5 dB.
    "fp8": _quantised(31.5),
}
"""What a sound file of each precision keeps to, and a broken one does not; derived from the number formats.

They say that a file computes its network, not that it is good enough: of a quantised file that is for its own
accuracy to say (`evaluate_runtime`), as no bound on logits tells what a loss of signal costs in classes."""


@dataclass(frozen=True)
class BatchParity:
    """Reference logits a (N, classes) against the artefact's b, computed in batches of `batch_size`.

    max_relative_error: max|a − b| / max|a|, both over all N × classes logits; infinite if b is not finite.
    mean_relative_error: mean|a − b| / mean|a|, likewise.
    rms_relative_error: √(Σ(a − b)² / Σa²), likewise.
    top1_agreement: percent of the samples whose top class by b is a top class by a; see `TIE`.
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

    def require(self, tolerance: Tolerance | float = TOLERANCES["fp32"]) -> None:
        """Hold every batch size to the tolerance; a number stands for that of fp32 with this `max_relative_error`.

        Raises:
            WorkError: with the figures of the first batch size that fails.
        """
        if not isinstance(tolerance, Tolerance):
            tolerance = replace(TOLERANCES["fp32"], max_relative_error=tolerance)
        for batch in self.batches:
            excess = _excess(batch, tolerance)
            if excess is None:
                continue
            raise WorkError(
                f"The artefact does not compute what the model does: at batch {batch.batch_size} {excess} and the top "
                f"class agrees on {batch.top1_agreement:.2f} % of {batch.samples} samples; export it again from the "
                "same weights, find the first layer that diverges with espalier compare --first-layer, and look for an "
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
        expected = logits(original, samples, largest).astype(np.float64)
    if not np.isfinite(expected).all():
        raise WorkError(
            "The PyTorch model's logits on the parity samples are not finite: its weights or the images hold "
            "NaN or infinite values."
        )
    batches = []
    for size in batch_sizes:
        actual = logits(runtime, samples, size, partial=False).astype(np.float64)
        batches.append(_compare(expected[: len(actual)], actual, size))
    return Parity(tuple(batches))


def evaluate_runtime(runtime: Runtime, loader: DataLoader, *, description: str = "evaluation") -> Evaluation:
    """Top-1, top-5 and loss of the very artefact over `loader`, by the same code that evaluates models.

    Raises:
        InputError: the loader is empty, or its images do not fit the artefact.
        WorkError: the loss is not finite, or the runtime failed.
    """
    return evaluate(_AsModule(runtime), loader, description=description)


def logits(runtime: Runtime, samples: torch.Tensor, batch_size: int, *, partial: bool = True) -> np.ndarray:
    """(N, C, H, W) -> (N, classes), computed in batches; without `partial`, of whole batches only.

    Raises:
        InputError: the artefact is no classifier, or does not take the samples.
        WorkError: the runtime failed.
    """
    return np.concatenate(
        [_infer(runtime, batch) for batch in samples.split(batch_size) if partial or len(batch) == batch_size]
    )


class _AsModule(nn.Module):
    """A runtime in place of a model: images (N, C, H, W) -> logits (N, classes), on the images' device."""

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
        rms_relative_error=_ratio(float(np.linalg.norm(difference)), float(np.linalg.norm(expected)))
        if finite
        else np.inf,
        top1_agreement=top1_agreement(expected, actual),
        largest_flip=float(_flips(expected, actual).max()),
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


def top1_agreement(expected: np.ndarray, actual: np.ndarray) -> float:
    """Percent of the rows whose largest element in `actual` is a largest one in `expected`, up to a `TIE`.

    A row of `actual` with NaN or infinity agrees with nothing.
    """
    return float(100 * (_flips(expected, actual) <= TIE).mean())


def _flips(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """`BatchParity.largest_flip` of each row: (N, classes) twice -> (N,)."""
    chosen = np.take_along_axis(expected, actual.argmax(axis=1, keepdims=True), axis=1)[:, 0]
    lost = expected.max(axis=1) - chosen
    scale = np.abs(expected).max(axis=1)
    flips = np.divide(lost, scale, out=np.zeros_like(lost), where=scale > 0)
    return np.where(np.isfinite(actual).all(axis=1), flips, np.inf)


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / scale)
