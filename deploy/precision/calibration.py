"""Ranges of a network's activations over real samples: what the scales of its quantised file are made from."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from compress.errors import InputError, MissingExtraError, WorkError, first_line
from compress.progress import progress_bar
from deploy.onnx_file import load_onnx, onnx_specs, read_onnx
from deploy.precision import Target
from deploy.precision.settings import Calibration
from deploy.tensor_spec import TensorSpec

logger = logging.getLogger(__name__)

Ranges = dict[str, tuple[float, float]]
"""Name of an activation -> its lowest and highest value."""

PERCENTILE = 99.99
"""Percent of an activation's values that `percentile` keeps; asymmetric ranges lose half of the rest at each end."""

BATCH = 8
"""Samples per forward pass: entropy and percentile hold all activations of a batch, 90 MB a sample for ResNet-50."""

# Entropy keeps ONNX Runtime's 128 bins, which later batches extend: of the digits ResNet, finer histograms made it cut
# ranges too short (a mean error of the int8 logits of 16 to 23 % with 256 to 2048 bins, of 1 to 5 % with 128).
_OPTIONS: dict[Calibration, dict[str, float]] = {
    "minmax": {},
    "entropy": {"num_bins": 128, "num_quantized_bins": 128},
    "percentile": {"num_bins": 2048, "percentile": PERCENTILE},
}


def calibrate(source: Path, samples: np.ndarray, *, method: Calibration = "minmax", target: Target = "cpu") -> Ranges:
    """The range of every activation of an fp32 file over `samples`, by ONNX Runtime's calibrators on the CPU.

    minmax       the lowest and highest value seen
    entropy      the range whose 8-bit histogram is nearest to the full one (Kullback-Leibler divergence)
    percentile   the range that holds `PERCENTILE` percent of the values

    Args:
        samples: images as the network takes them, float32 (N, C, H, W), N ≥ 1.
        target: ranges for "gpu" are symmetric around 0.

    Raises:
        InputError: the file cannot be read, or the samples are none, of another shape or type, or not finite.
        MissingExtraError: ONNX Runtime is not installed.
        WorkError: the network does not run, or an activation is not finite.
    """
    (spec,) = _inputs(source)
    check_samples(samples, spec)
    with TemporaryDirectory() as folder, _open(source, Path(folder), method, symmetric=target == "gpu") as calibrator:
        with progress_bar(f"calibration ({method})", len(samples)) as bar:
            for start in range(0, len(samples), BATCH):
                batch = np.ascontiguousarray(samples[start : start + BATCH])
                # One call a batch: the calibrators keep every activation of all batches of a call.
                calibrator.collect_data(_OneBatch({spec.name: batch}))
                bar.advance("", len(batch))
        found = calibrator.compute_data()
    ranges = {name: (_number(data.lowest), _number(data.highest)) for name, data in found.items()}
    for name, bounds in ranges.items():
        if not np.isfinite(bounds).all():
            raise WorkError(
                f"The activation {name} of {source.name} is not finite on the calibration samples: "
                "its weights hold NaN or infinite values, or it overflows float32."
            )
    return dict(sorted(ranges.items()))


def check_samples(samples: np.ndarray, spec: TensorSpec) -> None:
    """
    Raises:
        InputError: the calibration samples are none, of another shape or type than `spec`, or not finite.
    """
    if not isinstance(samples, np.ndarray) or samples.dtype != np.dtype(spec.dtype):
        given = samples.dtype if isinstance(samples, np.ndarray) else type(samples).__name__
        raise InputError(
            f"The calibration samples are {given}, but the network takes {spec}; normalise and convert the images."
        )
    if samples.ndim > 0 and len(samples) == 0:
        raise InputError("The calibration set is empty; give at least one image, better some hundreds.")
    if not spec.accepts(samples.shape):
        raise InputError(
            f"The calibration samples have shape {samples.shape}, but the network takes {spec}; "
            "give images of the size it was exported for."
        )
    if not np.isfinite(samples).all():
        raise InputError(
            "The calibration samples hold NaN or infinite values; check the images and their normalisation."
        )


class _OneBatch:
    """What ONNX Runtime's calibrators read from: gives its batch once."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self._batches = [batch]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._batches.pop() if self._batches else None


@contextmanager
def _open(source: Path, folder: Path, method: Calibration, *, symmetric: bool) -> Iterator[Any]:
    """A calibrator of ONNX Runtime; what it prints goes to our log, and the files that it writes into `folder`."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
        from onnxruntime.quantization import calibrate as library
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "Calibrating activations") from error
    kinds = library.CalibrationMethod
    kind = {"minmax": kinds.MinMax, "entropy": kinds.Entropy, "percentile": kinds.Percentile}[method]
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in read_onnx(source).graph.initializer)
    copy = folder / "model.onnx"  # the calibrators write beside the file they read
    onnx.save_model(load_onnx(source), str(copy), save_as_external_data=external, location="model.data")
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield library.create_calibrator(
                copy,
                augmented_model_path=str(folder / "augmented.onnx"),
                calibrate_method=kind,
                use_external_data_format=external,
                providers=["CPUExecutionProvider"],
                extra_options={"symmetric": symmetric, **_OPTIONS[method]},
            )
    except (state.Fail, state.InvalidGraph, state.NotImplemented, state.RuntimeException) as error:
        raise WorkError(f"ONNX Runtime cannot run {source.name} for calibration: {first_line(error)}.") from error
    finally:
        if printed.getvalue():
            logger.debug("calibration said:\n%s", printed.getvalue())


def _inputs(source: Path) -> tuple[TensorSpec, ...]:
    inputs, _ = onnx_specs(read_onnx(source), source)
    if len(inputs) != 1:
        raise InputError(f"{source} has {len(inputs)} inputs, but a classifier has one: give another file.")
    return inputs


def _number(value: Any) -> float:
    """The calibrators give arrays of one element, of rank 0 or 1."""
    return float(np.asarray(value).reshape(-1)[0])
