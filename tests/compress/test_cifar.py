"""The official CIFAR files, in small: both versions, damage, and pickles that would run code."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from compress import data
from compress.data import cifar
from compress.errors import InputError

NAMES = ("plane", "auto", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(12, 3072), dtype=np.uint8)


def binary10(root: Path, pixels: np.ndarray) -> Path:
    directory = root / "cifar-10-batches-bin"
    directory.mkdir()
    records = np.concatenate([np.arange(12, dtype=np.uint8)[:, None] % 10, pixels], axis=1)
    for number in range(5):
        (directory / f"data_batch_{number + 1}.bin").write_bytes(records[2 * number : 2 * number + 2].tobytes())
    (directory / "test_batch.bin").write_bytes(records[10:].tobytes())
    (directory / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return directory


def python10(root: Path, pixels: np.ndarray) -> Path:
    directory = root / "cifar-10-batches-py"
    directory.mkdir()
    files = {f"data_batch_{number + 1}": slice(2 * number, 2 * number + 2) for number in range(5)}
    files["test_batch"] = slice(10, 12)
    for name, rows in files.items():
        labels = [row % 10 for row in range(12)[rows]]
        content = {b"data": pixels[rows], b"labels": labels, b"batch_label": name.encode()}
        (directory / name).write_bytes(pickle.dumps(content, protocol=4))
    (directory / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [name.encode() for name in NAMES]}, protocol=4)
    )
    return directory


def python2_dump(pixels: np.ndarray, labels: list[int]) -> bytes:
    """As Python 2 wrote the official files: protocol 2, byte strings, NumPy's old module names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", side) for side in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


FORMS = {"binary": binary10, "python": python10}


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("around", [False, True])
def test_both_versions_are_read(form: str, around: bool, tmp_path: Path, pixels: np.ndarray) -> None:
    directory = FORMS[form](tmp_path, pixels)
    found = data.load(f"cifar10:{tmp_path if around else directory}", batch_size=10, augment=False)
    assert found.classes == NAMES
    assert found.image_shape == (3, 32, 32)
    images, labels = next(iter(found.test))
    assert labels.tolist() == [0, 1]
    plain = images * torch.tensor(found.std).view(3, 1, 1) + torch.tensor(found.mean).view(3, 1, 1)
    assert np.array_equal((plain * 255).round().to(torch.uint8).numpy(), pixels[10:].reshape(2, 3, 32, 32))
    assert sorted(next(iter(found.train))[1].tolist()) == list(range(10))


def test_files_written_by_python_2_are_read(tmp_path: Path, pixels: np.ndarray) -> None:
    directory = python10(tmp_path, pixels)
    (directory / "test_batch").write_bytes(python2_dump(pixels[3:5], [7, 9]))
    split = cifar.read(directory, 10)[1]
    assert split.labels.tolist() == [7, 9]
    assert np.array_equal(split.images.numpy(), pixels[3:5].reshape(2, 3, 32, 32))


def test_images_are_resized_when_asked(tmp_path: Path, pixels: np.ndarray) -> None:
    found = data.load(f"cifar10:{binary10(tmp_path, pixels)}", batch_size=10, image_size=48)
    assert found.image_shape == (3, 48, 48)
    assert next(iter(found.train))[0].shape == (10, 3, 48, 48)


def test_cifar100_takes_the_fine_label(tmp_path: Path, pixels: np.ndarray) -> None:
    labels = np.stack([np.full(12, 19), np.arange(88, 100)], axis=1).astype(np.uint8)  # coarse, fine
    content = np.concatenate([labels, pixels], axis=1).tobytes()
    (tmp_path / "train.bin").write_bytes(content)
    (tmp_path / "test.bin").write_bytes(content)
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"class{number}" for number in range(100)))
    found = data.load(f"cifar100:{tmp_path}", batch_size=12)
    assert len(found.classes) == 100
    assert next(iter(found.test))[1].tolist() == list(range(88, 100))


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no CIFAR-10.*cs\.toronto\.edu"):
        data.load(f"cifar10:{tmp_path}", batch_size=2)


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, pixels: np.ndarray) -> None:
    (binary10(tmp_path, pixels) / name).unlink()
    with pytest.raises(InputError, match=name):
        data.load(f"cifar10:{tmp_path}", batch_size=2)


def test_a_truncated_file_is_named(tmp_path: Path, pixels: np.ndarray) -> None:
    file = binary10(tmp_path, pixels) / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_2\.bin is truncated"):
        data.load(f"cifar10:{tmp_path}", batch_size=2)


def test_a_label_out_of_range(tmp_path: Path, pixels: np.ndarray) -> None:
    file = binary10(tmp_path, pixels) / "data_batch_2.bin"
    file.write_bytes(b"\x0b" + file.read_bytes()[1:])
    with pytest.raises(InputError, match="label 11"):
        data.load(f"cifar10:{tmp_path}", batch_size=2)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, pixels: np.ndarray) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    file = python10(tmp_path, pixels) / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": pixels[:2], b"labels": Attack()}))
    with pytest.raises(InputError, match="data_batch_1 is not a file of CIFAR-10"):
        data.load(f"cifar10:{tmp_path}", batch_size=2)
    assert not (tmp_path / "ran").exists()
