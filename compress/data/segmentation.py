"""Folders of images and masks of the same names, checked before the first epoch.

PATH/train/images/NAME.jpg   PATH/train/masks/NAME.png   and the same in val/
PATH/classes.txt             one name per line, the first for index 0; may be left out

A mask is a PNG file of the image's size whose pixels are class indices (Pillow's mode L or P); 255 stands for no class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import pil_to_tensor

from compress.data.image_folder import CHECKED_UP_FRONT, MEAN, STD, UNREADABLE, UnreadableImageError, decode, unreadable
from compress.errors import InputError
from compress.progress import progress_bar
from compress.tasks import IGNORED

CLASSES = "classes.txt"

Pair = tuple[Path, Path]  # image, mask


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images float32 (3, size, size), normalised, and masks int64 (size, size)."""

    def __init__(self, pairs: Sequence[Pair], *, image_size: int, augment: bool, names: Path, classes: int) -> None:
        self.pairs = pairs
        self._size = [image_size, image_size]
        self._augment = augment
        self._names = names
        self._classes = classes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        indices = _indices(mask)
        _require_named(mask, _largest(indices), self._classes, self._names)
        pixels, classes = pil_to_tensor(decode(str(image))), torch.tensor(indices)[None]  # (3, H, W), (1, H, W)
        if self._augment:
            top, left, height, width = RandomResizedCrop.get_params(pixels, [0.25, 1.0], [3 / 4, 4 / 3])
            flipped = bool(torch.rand(1) < 0.5)
            pixels, classes = (
                found[:, top : top + height, left : left + width].flip([-1] if flipped else [])
                for found in (pixels, classes)
            )
        # Not v2's transforms of pairs: they shift masks against images by half a pixel (NEAREST, not NEAREST_EXACT).
        pixels = functional.resize(pixels, self._size, InterpolationMode.BILINEAR, antialias=True)
        classes = functional.resize(classes, self._size, InterpolationMode.NEAREST_EXACT)
        scaled = functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(scaled, list(MEAN), list(STD)), classes[0].long()


def open_folder(path: Path, *, image_size: int, augment: bool) -> tuple[MaskedImages, MaskedImages, tuple[str, ...]]:
    """The training and test sets in `path`/train and `path`/val, and the names of the classes.

    An image and its mask are brought to `image_size` as a whole, the image bilinearly and the mask by its nearest
    pixels. Training pairs, when augmented, are a piece of at least a quarter of the area, cut out at random, and
    flipped, both alike. Up to 20,000 files are checked here.

    Raises:
        InputError: a folder is missing or empty, an image lacks its mask or a mask its image, their sizes differ, a
            file is unreadable or no mask, a mask has an index without a name, or no mask of a split has any class.
    """
    train = _pairs(path / "train")
    test = _pairs(path / "val")
    classes = _names(path / CLASSES)
    if 2 * (len(train) + len(test)) <= CHECKED_UP_FRONT:
        largest = _check(train + test, classes, path)
        classes = classes or tuple(str(index) for index in range(largest + 1))
    elif not classes:
        raise InputError(
            f"{path} holds more than {CHECKED_UP_FRONT:,} files, too many to look for the largest class index: write "
            f"the names of the classes into {path / CLASSES}, one per line."
        )
    shared: dict[str, Any] = {"image_size": image_size, "names": path / CLASSES, "classes": len(classes)}
    return MaskedImages(train, augment=augment, **shared), MaskedImages(test, augment=False, **shared), classes


def _pairs(split: Path) -> list[Pair]:
    """Images and masks of one split, in the order of their names."""
    for folder in (split / "images", split / "masks"):
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a directory: segmentation needs images/ and masks/ in train/ and in val/ of "
                f"{split.parent}."
            )
    images = {file.stem: file for file in sorted((split / "images").iterdir()) if file.suffix.lower() in IMG_EXTENSIONS}
    masks = {file.stem: file for file in sorted((split / "masks").iterdir()) if file.suffix.lower() == ".png"}
    if not images:
        raise InputError(f"{split / 'images'} holds no image: put files with the ending .jpg, .png or the like there.")
    for what, alone, other in (("mask", images, masks), ("image", masks, images)):
        lonely = [file for name, file in alone.items() if name not in other]
        if lonely:
            more = f", and {len(lonely) - 1} more have none" if len(lonely) > 1 else ""
            folder = split / f"{what}s"
            raise InputError(
                f"{lonely[0]} has no {what} in {folder}{more}: masks are PNG files of the same names as the images."
            )
    return [(file, masks[name]) for name, file in images.items()]


def _names(file: Path) -> tuple[str, ...]:
    """Names of the classes; empty where there is no such file."""
    if not file.exists():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {file} ({error}): give a text file in UTF-8, one name per line.") from error
    if not 1 <= len(names) <= IGNORED:
        raise InputError(f"{file} names {len(names)} classes: give 1 to {IGNORED}, one per line.")
    return names


def _check(pairs: Sequence[Pair], names: Sequence[str], path: Path) -> int:
    """The largest class index in all masks."""
    largest = -1
    with progress_bar("checking images and masks", total=len(pairs)) as bar:
        for file, mask in pairs:
            try:
                with Image.open(file) as image:
                    width, height = image.size
                    image.verify()
            except UNREADABLE as error:
                raise unreadable(str(file), error) from error
            indices = _indices(mask)
            if indices.shape != (height, width):
                raise InputError(
                    f"{mask} has {indices.shape[1]}x{indices.shape[0]} pixels and {file} {width}x{height}: they must "
                    "be of one size."
                )
            found = _largest(indices)
            if names:
                _require_named(mask, found, len(names), path / CLASSES)
            largest = max(largest, found)
            bar.advance("")
    if largest < 0:
        raise InputError(f"The masks in {path} hold no class, only {IGNORED} for none: correct them.")
    return largest


def _largest(indices: np.ndarray) -> int:
    """The largest class index; -1 where no pixel has a class."""
    counted = indices[indices != IGNORED]
    return int(counted.max()) if counted.size else -1


def _require_named(mask: Path, largest: int, classes: int, file: Path) -> None:
    if largest >= classes:
        raise UnreadableImageError(
            f"{mask} holds the class index {largest}, but {file} names {classes} classes: name all, or write {IGNORED} "
            "where a pixel has no class."
        )


def _indices(mask: Path) -> np.ndarray:
    """Class indices of a mask, uint8 (H, W)."""
    try:
        with Image.open(mask) as image:
            mode = image.mode
            indices = np.asarray(image)
    except UNREADABLE as error:
        raise unreadable(str(mask), error) from error
    if mode not in ("L", "P"):
        raise UnreadableImageError(
            f"{mask} has the mode {mode}, but a mask holds one class index per pixel: save it in the mode L or P."
        )
    return indices
