"""Class names and probabilities for images, in one call.

with deploy.load(Path("runs/mine")) as predictor:
    print(predictor.predict(images).classes)
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np
import torch

from compress.errors import InputError, WorkError
from deploy.choosing import Device, Kind, choose_artefact, describing_onnx
from deploy.images import prepare, split_images
from deploy.metadata import Metadata
from deploy.onnx_file import read_metadata
from deploy.runtimes import RUNTIMES, Runtime, open_runtime

logger = logging.getLogger(__name__)

CHUNK: Final = 32
"""Images that go through a file without a largest batch of its own at once, so that memory stays bounded."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of some images."""

    names: tuple[str, ...]
    """Of all classes, in the order of the outputs; "0", "1", … where the artefact knows none."""
    probabilities: np.ndarray
    """float32 (N, classes), or (N, classes, H, W) of a network that classifies pixels; the classes add up to 1."""

    @property
    def indices(self) -> np.ndarray:
        """Index of the most probable class of each image (N,), or of each pixel (N, H, W) at the network's size."""
        found: np.ndarray = self.probabilities.argmax(axis=1)
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of the most probable class of each image.

        Raises:
            InputError: the network classifies pixels.
        """
        self._require_images()
        return tuple(self.names[index] for index in self.indices)

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """The `k` most probable classes of each image with their probabilities, the most probable first.

        Raises:
            InputError: there are not so many classes, or the network classifies pixels.
        """
        self._require_images()
        if not 1 <= k <= len(self.names):
            raise InputError(f"The top {k} of {len(self.names)} classes were asked for: give 1 to {len(self.names)}.")
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.names[index], float(row[index])) for index in best]
            for row, best in zip(self.probabilities, order, strict=True)
        ]

    def _require_images(self) -> None:
        if self.probabilities.ndim > 2:
            raise InputError(
                "The network classifies pixels, not whole images: read `indices`, the class of each pixel, or "
                "`probabilities`."
            )


class Predictor:
    """An artefact that is open in a runtime, with the pre-processing that it records.

    Attributes:
        artefact: the file that runs.
        about: what it records of classes and pre-processing.
        runtime: what executes it.
        largest_batch: images that go through it at once; more are split.
    """

    def __init__(self, artefact: Path, about: Metadata, runtime: Runtime, *, largest_batch: int = CHUNK) -> None:
        self.artefact = artefact
        self.about = about
        self.runtime = runtime
        self.largest_batch = largest_batch

    def predict(self, images: Any) -> Prediction:
        """Classify one image or several; see `deploy.images` for what is taken and what is done to it.

        Raises:
            InputError: these are no images for this network.
            WorkError: the runtime failed.
        """
        found = split_images(images, self.about.image_shape[0])
        spec = self.runtime.inputs[0]
        logits = []
        for start in range(0, len(found), self.largest_batch):
            batch = torch.stack([prepare(image, self.about) for image in found[start : start + self.largest_batch]])
            outputs = self.runtime.run({spec.name: batch.numpy().astype(spec.dtype)})
            logits.append(outputs[self.runtime.outputs[0].name].astype(np.float32))
        probabilities = torch.from_numpy(np.concatenate(logits)).softmax(dim=1).numpy()
        return Prediction(self._names(probabilities.shape[1]), probabilities)

    def close(self) -> None:
        """Release the runtime; the predictor cannot be used afterwards."""
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _names(self, count: int) -> tuple[str, ...]:
        names = self.about.classes or tuple(map(str, range(count)))
        if len(names) != count:
            raise WorkError(f"{self.artefact} names {len(names)} classes but gives {count} outputs: export it again.")
        return names


def load(
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    runtime: str | None = None,
    artefact: str | None = None,
    trusted_manifest: Path | None = None,
) -> Predictor:
    """Open a run directory, an ONNX file or a TensorRT engine for prediction.

    Args:
        path: of a run directory its best artefact for the device is taken, see `deploy.choosing.choose_artefact`.
        device, threads, runtime, trusted_manifest: see `deploy.runtimes.open_runtime`.
        artefact: file name in the `artifacts/` of a run directory, in place of the best one.

    Raises:
        InputError: there is no such run or file, it was changed, says not how to feed it, or cannot be run on the
            device.
        MissingExtraError: the library that executes it is not installed.
    """
    path = Path(path)
    if path.is_dir():
        choice = choose_artefact(path, device=_device(device), kind=_kind(runtime), artefact=artefact)
        logger.info("%s: chosen because %s", choice.path, choice.reason)
        path = choice.path
    elif artefact is not None:
        raise InputError(f"{path} is no run directory, so no artefact of it can be named: give the file alone.")
    opened = open_runtime(path, device=device, threads=threads, runtime=runtime, trusted_manifest=trusted_manifest)
    try:
        about = read_metadata(describing_onnx(path, listed=trusted_manifest))
        if len(opened.inputs) != 1:
            raise InputError(f"{path} takes {len(opened.inputs)} inputs, but images are one: give a classifier.")
        return Predictor(path, about, opened, largest_batch=opened.largest_batch or CHUNK)
    except BaseException:
        opened.close()
        raise


def _device(device: str) -> Device:
    """ "cuda:1" -> "cuda"; `open_runtime` refuses what is neither the CPU nor a GPU."""
    return "cpu" if device == "cpu" else "cuda"


def _kind(runtime: str | None) -> Kind | None:
    """What the runtime executes; None where that does not decide, or it is unknown, which `open_runtime` says."""
    found = RUNTIMES.get(runtime.partition(":")[0]) if runtime is not None else None
    return None if found is None or found.suffix is None else cast(Kind, found.suffix.removeprefix("."))
