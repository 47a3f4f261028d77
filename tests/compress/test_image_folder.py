"""Folders of images: transforms, repeatable epochs, and every way in which a folder can be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compress import data
from compress.data import Data, image_folder
from compress.errors import InputError


def epoch(found: Data, seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(images, labels) for images, labels in found.train]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_images_come_normalised_and_repeat(workers: int, folder: Path) -> None:
    found = data.load(f"imagefolder:{folder}", batch_size=4, image_size=32, workers=workers)
    assert found.classes == ("cat", "dog")
    assert found.image_shape == (3, 32, 32)
    first = epoch(found, 3)
    assert [len(labels) for _, labels in first] == [4]
    assert first[0][0].shape == (4, 3, 32, 32)
    assert same(first, epoch(found, 3))
    assert torch.cat([labels for _, labels in found.test]).tolist() == [0, 0, 1, 1]


def test_the_default_size_is_that_of_imagenet(folder: Path) -> None:
    assert data.load(f"imagefolder:{folder}", batch_size=2).image_shape == (3, 224, 224)


def test_evaluation_pixels(folder: Path) -> None:
    for file in folder.glob("val/*/*.jpg"):
        Image.new("L", (64, 64), 255).save(file)  # grey files become RGB
    found = data.load(f"imagefolder:{folder}", batch_size=4, image_size=56)
    images, _ = next(iter(found.test))
    white = (1 - torch.tensor(image_folder.MEAN)) / torch.tensor(image_folder.STD)
    assert torch.allclose(images, white.view(1, 3, 1, 1).expand_as(images), atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_an_unreadable_image_is_named_at_once(content: bytes, folder: Path) -> None:
    bad = folder / "val" / "dog" / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(InputError, match=f"Cannot read the image {bad}"):
        data.load(f"imagefolder:{folder}", batch_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_image_is_named_when_it_is_used(workers: int, folder: Path) -> None:
    bad = folder / "val" / "cat" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])  # the header is whole
    found = data.load(f"imagefolder:{folder}", batch_size=2, image_size=32, workers=workers)
    with pytest.raises(InputError) as caught:
        list(found.test)
    assert str(caught.value).startswith(f"Cannot read the image {bad} (")
    assert "\n" not in str(caught.value)


def test_classes_that_differ_are_named(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "doge")
    with pytest.raises(InputError, match="only train/ has dog; only val/ has doge"):
        data.load(f"imagefolder:{folder}", batch_size=2)


def test_an_empty_class_is_named(folder: Path) -> None:
    (folder / "train" / "eel").mkdir()
    with pytest.raises(InputError, match="eel"):
        data.load(f"imagefolder:{folder}", batch_size=2)


def test_a_missing_split_is_named(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    with pytest.raises(InputError, match="val is not a directory"):
        data.load(f"imagefolder:{folder}", batch_size=2)
