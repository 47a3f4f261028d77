"""Labelled images by the name of their source, as loaders of normalised batches.

digits                    scikit-learn's 1,797 handwritten digits: 1 channel, 32 x 32
glyphs                    62 letters and digits, drawn from fonts: 3 channels, 32 x 32
cifar10:/path             the official files, binary or Python version
cifar100:/path
imagefolder:/path         train/ and val/ with one subfolder per class
segmentation:/path        train/ and val/ with images/ and masks/ of class indices
package.module:function   the user's own, imported only with the user's leave
"""

import difflib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from compress.data import cifar, glyphs, image_folder, segmentation
from compress.data.in_memory import (
    Augmentation,
    RandomAffine,
    Split,
    TensorImages,
    batch_loader,
    crop_and_flip,
    drops_last,
)
from compress.data.opened import Data, Options
from compress.data.user_function import open_function
from compress.errors import InputError


def load(
    source: str,
    *,
    batch_size: int,
    image_size: int | None = None,
    workers: int = 0,
    augment: bool = True,
    seed: int = 0,
    trust: Collection[str] = (),
) -> Data:
    """Open a data set.

    Shuffling and augmentation draw from torch's global generator: seed it before an epoch and the epoch
    repeats.

    Args:
        source: one of the forms above. A user's function is called with those of the arguments batch_size,
            image_size, workers, augment and seed that it declares, and returns `Data` or a pair (train
            loader, test loader).
        batch_size: images per batch; the training loader leaves out a last, shorter batch.
        image_size: side in pixels; None takes the source's own (224 for imagefolder and segmentation).
        workers: processes that decode images, for imagefolder and segmentation; sets held in memory need none.
        augment: whether training images are changed at random.
        seed: which set `glyphs` draws. The split of `digits` is always the same.
        trust: modules that `package.module:function` may import: a top-level package, the exact module, or
            "*" for any.

    Raises:
        InputError: the source is unknown or cannot be read, or an option has an impossible value.
    """
    for key, value, least in (
        ("batch_size", batch_size, 1),
        ("image_size", image_size, 1),
        ("workers", workers, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{key} is {value}: it must be at least {least}.")
    options = Options(batch_size, image_size, workers, augment, seed)
    kind, separator, argument = source.partition(":")
    if kind in SOURCES:
        return SOURCES[kind](argument, options)
    if not separator or not argument:
        near = difflib.get_close_matches(kind, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(SOURCES)} or package.module:function."
        raise InputError(f"There is no data source {source!r}: {hint}")
    return open_function(source, options, trust)


def _digits(argument: str, options: Options) -> Data:
    _refuse_argument("digits", argument)
    side = options.image_size or 32
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    labels = torch.from_numpy(bunch.target).long()
    # Stratified and fixed, whatever the run's seed, so that accuracies of different runs compare.
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return _in_memory(
        "digits",
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        options,
        classes=tuple("0123456789"),
        mean=(0.3054,),  # of the training split at 32 x 32
        std=(0.3237,),
        augmentation=RandomAffine(degrees=10, scale=0.1, shift=2 / 32, padding="zeros"),
    )


def _glyphs(argument: str, options: Options) -> Data:
    _refuse_argument("glyphs", argument)
    drawn = glyphs.load(seed=options.seed)
    return _in_memory(
        "glyphs",
        Split(drawn.train_images, drawn.train_labels),
        Split(drawn.test_images, drawn.test_labels),
        options,
        classes=glyphs.CLASSES,
        mean=(0.5, 0.5, 0.5),
        std=(0.26, 0.26, 0.26),
        augmentation=RandomAffine(degrees=10, scale=0.1, shift=2 / 32, padding="border"),
    )


def _cifar10(argument: str, options: Options) -> Data:
    train, test, classes = cifar.read(_directory("cifar10", argument), 10)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _in_memory("cifar10", train, test, options, classes=classes, mean=mean, std=std, augmentation=crop_and_flip)


def _cifar100(argument: str, options: Options) -> Data:
    train, test, classes = cifar.read(_directory("cifar100", argument), 100)
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return _in_memory("cifar100", train, test, options, classes=classes, mean=mean, std=std, augmentation=crop_and_flip)


def _imagefolder(argument: str, options: Options) -> Data:
    side = options.image_size or 224
    path = _directory("imagefolder", argument)
    train, test = image_folder.open_folder(path, image_size=side, augment=options.augment)
    loaders = _loaders(train, test, options)
    return Data(
        name="imagefolder",
        train=loaders[0],
        test=loaders[1],
        classes=tuple(train.classes),
        image_shape=(3, side, side),
        mean=image_folder.MEAN,
        std=image_folder.STD,
        resize=image_folder.resized_side(side),
    )


def _segmentation(argument: str, options: Options) -> Data:
    side = options.image_size or 224
    path = _directory("segmentation", argument)
    train, test, classes = segmentation.open_folder(path, image_size=side, augment=options.augment)
    loaders = _loaders(train, test, options)
    return Data(
        name="segmentation",
        train=loaders[0],
        test=loaders[1],
        classes=classes,
        image_shape=(3, side, side),
        mean=image_folder.MEAN,
        std=image_folder.STD,
        task="segmentation",
    )


def _loaders(train: Dataset[Any], test: Dataset[Any], options: Options) -> tuple[DataLoader, DataLoader]:
    # Workers are started anew for every epoch: kept alive, they would not follow a re-seeded global
    # generator.
    shared: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.workers}
    drop_last = drops_last(len(train), options.batch_size, train=True)  # type: ignore[arg-type]  # both have a length
    return DataLoader(train, shuffle=True, drop_last=drop_last, **shared), DataLoader(test, **shared)


# A user's own source is one more entry: it takes what follows the colon, and the options.
SOURCES: dict[str, Callable[[str, Options], Data]] = {
    "digits": _digits,
    "glyphs": _glyphs,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagefolder": _imagefolder,
    "segmentation": _segmentation,
}


def _in_memory(
    name: str,
    train: Split,
    test: Split,
    options: Options,
    *,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augmentation: Augmentation,
) -> Data:
    channels, own_side = train.images.shape[1:3]
    side = options.image_size or own_side
    shared: dict[str, Any] = {"mean": mean, "std": std, "image_size": side}
    training = TensorImages(train, augmentation=augmentation if options.augment else None, **shared)
    return Data(
        name=name,
        train=batch_loader(training, batch_size=options.batch_size, train=True),
        test=batch_loader(TensorImages(test, **shared), batch_size=options.batch_size, train=False),
        classes=classes,
        image_shape=(channels, side, side),
        mean=mean,
        std=std,
    )


def _directory(kind: str, argument: str) -> Path:
    path = Path(argument).expanduser()
    if not argument or not path.is_dir():
        raise InputError(f"The data directory {argument!r} does not exist: write {kind}:/path/to/it.")
    return path


def _refuse_argument(kind: str, argument: str) -> None:
    if argument:
        raise InputError(f"{kind} takes no path, and {argument!r} was given: write {kind} alone.")
