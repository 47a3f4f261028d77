"""Folders of images and masks: what arrives, what is cut out and flipped together, and every way to be wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress import data
from compress.data import segmentation
from compress.errors import InputError
from compress.tasks import IGNORED


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The red channel of every image is 100 times the class of the mask; the upper row has none."""
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            mask = np.zeros((20, 30), np.uint8)
            mask[:, 10 + index : 20] = 1
            mask[:, 20:] = 2
            write(tmp_path / split / "images" / f"{index}.png", np.stack([100 * mask] * 3, axis=2))
            mask[0] = IGNORED
            write(tmp_path / split / "masks" / f"{index}.png", mask)
    return tmp_path


def load(folder: Path, **options: int | bool) -> data.Data:
    return data.load(f"segmentation:{folder}", batch_size=2, **{"image_size": 40, **options})  # type: ignore[arg-type]


def test_what_arrives(folder: Path) -> None:
    found = load(folder)
    assert (found.task, found.classes, found.image_shape) == ("segmentation", ("0", "1", "2"), (3, 40, 40))
    assert found.resize is None
    images, masks = next(iter(found.test))
    assert (images.shape, images.dtype, masks.shape, masks.dtype) == (
        (2, 3, 40, 40),
        torch.float32,
        (2, 40, 40),
        torch.int64,
    )
    # 30 columns become 40: column 10 of the file is at 13.3; 20 rows become 40: the first two have no class.
    assert masks[0, 2:].unique(dim=0).tolist() == [[0] * 13 + [1] * 14 + [2] * 13]
    assert (masks[:, :2] == IGNORED).all()
    assert type(images) is type(masks) is torch.Tensor


@pytest.mark.parametrize("workers", [0, 1])
def test_image_and_mask_are_cut_out_and_flipped_alike(folder: Path, workers: int) -> None:
    found = load(folder, workers=workers)
    torch.manual_seed(0)
    seen = [(images, masks) for images, masks in found.train]
    torch.manual_seed(0)
    assert all(torch.equal(masks, again) for (_, masks), (_, again) in zip(seen, found.train, strict=True))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    for images, masks in seen:
        red = (images * std + mean)[:, 0] * 255 / 100
        known = masks != IGNORED
        inside = known & (red.round() - red).abs().lt(0.05)  # on a border the image is interpolated
        assert inside.float().mean() > 0.5
        assert torch.equal(red.round().long()[inside], masks[inside])
    assert len({float(masks.float().mean()) for _, masks in seen}) > 1


def test_without_augmentation_training_images_are_whole(folder: Path) -> None:
    found = load(folder, augment=False)
    assert all((masks[:, 2:].unique() == torch.arange(3)).all() for _, masks in found.train)


def test_names_and_palettes(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\nwall \n\nsky\nnever\n")
    file = folder / "val" / "masks" / "0.png"
    mask = Image.open(file)
    palette = Image.fromarray(np.asarray(mask), "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(file)
    found = load(folder)
    assert found.classes == ("ground", "wall", "sky", "never")
    assert next(iter(found.test))[1].unique().tolist() == [0, 1, 2, IGNORED]


def remove_masks(folder: Path) -> None:
    for file in (folder / "val" / "masks").iterdir():
        file.unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        lambda f: (f / "val" / "masks").rename(f / "elsewhere"),
        r"val/masks is not a directory: segmentation",
    ),
    "no image": (lambda f: [p.unlink() for p in (f / "train" / "images").iterdir()], r"train/images holds no image"),
    "no masks": (remove_masks, r"val/images/0.png has no mask in .*val/masks, and 1 more have none"),
    "no mask": (lambda f: (f / "train" / "masks" / "2.png").unlink(), r"train/images/2.png has no mask in"),
    "lone mask": (lambda f: (f / "train" / "images" / "2.png").unlink(), r"train/masks/2.png has no image in"),
    "coloured": (
        lambda f: Image.new("RGB", (30, 20)).save(f / "val" / "masks" / "1.png"),
        r"val/masks/1.png has the mode RGB",
    ),
    "other size": (
        lambda f: Image.new("L", (30, 21)).save(f / "val" / "masks" / "1.png"),
        r"1.png has 30x21 pixels and .*1.png 30x20",
    ),
    "unnamed": (
        lambda f: (f / "classes.txt").write_text("a\nb\n"),
        r"holds the class index 2, but .*classes.txt names 2",
    ),
    "empty names": (lambda f: (f / "classes.txt").write_text("\n"), r"classes.txt names 0 classes"),
    "damaged image": (
        lambda f: (f / "val" / "images" / "1.png").write_text("no"),
        r"Cannot read the image .*images/1.png",
    ),
    "damaged mask": (
        lambda f: (f / "val" / "masks" / "1.png").write_text("no"),
        r"Cannot read the image .*masks/1.png",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_before_training(wrong: str, folder: Path) -> None:
    spoil, message = WRONG[wrong]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_masks_without_any_class(folder: Path) -> None:
    for file in folder.glob("*/masks/*.png"):
        Image.new("L", (30, 20), IGNORED).save(file)
    with pytest.raises(InputError, match="hold no class, only 255"):
        load(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_large_folders_need_names_and_are_checked_as_they_are_used(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "CHECKED_UP_FRONT", 3)
    with pytest.raises(InputError, match=r"write the names of the classes into .*classes.txt"):
        load(folder)
    (folder / "classes.txt").write_text("a\nb\n")
    found = load(folder, workers=workers)
    with pytest.raises(InputError, match=r"^\S*masks/0.png holds the class index 2"):
        list(found.test)
