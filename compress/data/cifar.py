"""CIFAR-10 and CIFAR-100 from the official files (https://www.cs.toronto.edu/~kriz/cifar.html).

Both forms are read: the binary version, and the Python version, whose pickles pass an unpickler that can
build nothing but plain values and NumPy arrays.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

from compress.data.in_memory import Split
from compress.errors import InputError

SIDE = 32  # pixels
_PIXELS = 3 * SIDE * SIDE  # red, green, blue planes, row by row


@dataclass(frozen=True)
class _Layout:
    """Where each set keeps what; a record of the binary version is `label_bytes` and then the pixels."""

    title: str
    binary_directory: str
    python_directory: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int  # the last of them is the label that counts
    label_key: bytes
    binary_names: str
    python_names: str
    names_key: bytes
    classes: int


_LAYOUTS = {
    10: _Layout(
        title="CIFAR-10",
        binary_directory="cifar-10-batches-bin",
        python_directory="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        label_bytes=1,
        label_key=b"labels",
        binary_names="batches.meta.txt",
        python_names="batches.meta",
        names_key=b"label_names",
        classes=10,
    ),
    100: _Layout(
        title="CIFAR-100",
        binary_directory="cifar-100-binary",
        python_directory="cifar-100-python",
        train=("train",),
        test=("test",),
        label_bytes=2,  # coarse, fine
        label_key=b"fine_labels",
        binary_names="fine_label_names.txt",
        python_names="meta",
        names_key=b"fine_label_names",
        classes=100,
    ),
}


def read(path: Path, classes: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and class names of CIFAR-10 or CIFAR-100 (`classes`); images uint8 (N, 3,
    32, 32).

    `path` is the unpacked directory or the one around it.

    Raises:
        InputError: the files are missing, damaged, or hold objects that are not plain data.
    """
    layout = _LAYOUTS[classes]
    for directory in (path, path / layout.binary_directory, path / layout.python_directory):
        if (directory / f"{layout.train[0]}.bin").is_file():
            return _read_binary(directory, layout)
        if (directory / layout.train[0]).is_file():
            return _read_python(directory, layout)
    raise InputError(
        f"{path} holds no {layout.title}: unpack the binary or Python version from "
        "https://www.cs.toronto.edu/~kriz/cifar.html there."
    )


def _read_binary(directory: Path, layout: _Layout) -> tuple[Split, Split, tuple[str, ...]]:
    def split(files: tuple[str, ...]) -> Split:
        parts = []
        for name in files:
            file = directory / f"{name}.bin"
            content = np.frombuffer(_bytes(file, layout), dtype=np.uint8)
            if content.size == 0 or content.size % (layout.label_bytes + _PIXELS):
                raise InputError(f"{file} is truncated: fetch {layout.title} again.")
            parts.append(content.reshape(-1, layout.label_bytes + _PIXELS))
        records = np.concatenate(parts)
        return _split(records[:, layout.label_bytes :], records[:, layout.label_bytes - 1], directory, layout)

    names = _bytes(directory / layout.binary_names, layout).decode(errors="replace").split()
    return split(layout.train), split(layout.test), _checked_names(names, directory, layout)


def _read_python(directory: Path, layout: _Layout) -> tuple[Split, Split, tuple[str, ...]]:
    def split(files: tuple[str, ...]) -> Split:
        contents = [_unpickle(directory / name, layout, (b"data", layout.label_key)) for name in files]
        try:
            pixels = np.concatenate([content[b"data"] for content in contents])
            labels = np.concatenate([content[layout.label_key] for content in contents])
        except ValueError as error:
            raise InputError(f"{directory} is damaged ({error}): fetch {layout.title} again.") from error
        return _split(pixels, labels, directory, layout)

    names = _unpickle(directory / layout.python_names, layout, (layout.names_key,))[layout.names_key]
    decoded = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names]
    return split(layout.train), split(layout.test), _checked_names(decoded, directory, layout)


def _split(pixels: np.ndarray, labels: np.ndarray, directory: Path, layout: _Layout) -> Split:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise InputError(f"{directory} is damaged (pixels {pixels.shape}): fetch {layout.title} again.")
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise InputError(f"{directory} is damaged (label {labels.max()}): fetch {layout.title} again.")
    images = torch.from_numpy(np.array(pixels)).view(-1, 3, SIDE, SIDE)
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def _checked_names(names: list[str], directory: Path, layout: _Layout) -> tuple[str, ...]:
    if len(names) != layout.classes:
        raise InputError(f"{directory} names {len(names)} classes instead of {layout.classes}: fetch it again.")
    return tuple(names)


def _bytes(file: Path, layout: _Layout) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}; unpack all of {layout.title} there.") from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain values and NumPy arrays; anything else is refused before it is imported."""

    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012 - the base class is not a dataclass
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _unpickle(file: Path, layout: _Layout, keys: tuple[bytes, ...]) -> dict[bytes, Any]:
    """The dictionary in a file of the Python version, which must have these keys."""
    try:
        content = _PlainUnpickler(io.BytesIO(_bytes(file, layout)), encoding="bytes").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        raise InputError(f"{file} is not a file of {layout.title} ({error}): fetch it again.") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise InputError(f"{file} is not a file of {layout.title}: fetch it again.")
    return content
