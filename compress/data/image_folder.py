"""Folders of images, one subfolder per class, checked before the first epoch."""

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from compress.errors import InputError
from compress.progress import progress_bar

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, images in [0, 1]
STD = (0.229, 0.224, 0.225)

CHECKED_UP_FRONT = 20_000  # files; more would cost minutes before training starts
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)  # what Pillow raises on bad files


class UnreadableImageError(InputError):
    """An image file that Pillow cannot decode, or a mask that is none; the message names it.

    A worker process of a `DataLoader` re-raises its errors by calling the type with a whole traceback as
    text, whose last line is the sentence to keep.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


def open_folder(path: Path, *, image_size: int, augment: bool) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    """The training and test sets in `path`/train and `path`/val: normalised float32 images (3, size, size).

    Training images, when augmented, are cropped at random (`RandomResizedCrop`) and flipped; the others are
    resized to 256/224 of the size and cropped at the centre, as torchvision's ImageNet evaluation does. Up to
    20,000 files have their headers checked here, larger folders only as their images are used: a warning says
    so.

    Raises:
        InputError: a folder is missing or empty, train/ and val/ differ in their classes, or an image is
            unreadable.
    """
    for name in ("train", "val"):
        if not (path / name).is_dir():
            raise InputError(f"{path / name} is not a directory: imagefolder needs train/ and val/ in {path}.")
    evaluation = v2.Compose(
        [v2.Resize(resized_side(image_size), antialias=True), v2.CenterCrop(image_size), *_to_tensor()]
    )
    augmented = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *_to_tensor()])
    train = _open_split(path / "train", augmented if augment else evaluation)
    test = _open_split(path / "val", evaluation)
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))
        only_test = sorted(set(test.classes) - set(train.classes))
        parts = [
            f"only {split}/ has {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for split, names in (("train", only_train), ("val", only_test))
            if names
        ]
        raise InputError(f"train/ and val/ in {path} have other classes ({'; '.join(parts)}): make them equal.")
    _check_headers([Path(file) for file, _ in train.samples + test.samples])
    return train, test


def resized_side(image_size: int) -> int:
    """Shorter side in pixels before the centre is cut out, as torchvision's ImageNet evaluation has it."""
    return round(image_size * 256 / 224)


def _to_tensor() -> list[Any]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]


def _open_split(path: Path, transform: v2.Compose) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(path), transform, loader=decode)
    except OSError as error:  # FileNotFoundError where a class has no image, or there is no class
        raise InputError(
            f"Cannot use {path}: {str(error).rstrip('.')}; give every class a subfolder with images."
        ) from error


def decode(file: str) -> Image.Image:
    """An RGB image; the file is closed again."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise unreadable(file, error) from error


def _check_headers(files: list[Path]) -> None:
    if len(files) > CHECKED_UP_FRONT:
        logging.getLogger(__name__).warning(
            "%d images are too many to check beforehand (limit %d): a damaged one is found only when used.",
            len(files),
            CHECKED_UP_FRONT,
        )
        return
    with progress_bar("checking images", total=len(files)) as bar:
        for file in files:
            try:
                with Image.open(file) as image:
                    image.verify()
            except UNREADABLE as error:
                raise unreadable(str(file), error) from error
            bar.advance("")


def unreadable(file: str, error: Exception) -> UnreadableImageError:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).replace("\n", " ")
    return UnreadableImageError(f"Cannot read the image {file} ({reason}): replace or delete it.")
