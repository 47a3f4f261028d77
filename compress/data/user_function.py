"""The user's own data source: a function that is called with the options that it takes."""

import inspect
from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from compress.data.opened import Data, Options
from compress.errors import InputError
from compress.models import resolve
from compress.tasks import IGNORED


def open_function(source: str, options: Options, trust: Collection[str]) -> Data:
    """Call the user's function and complete what it returns, see `sources.load`.

    Raises:
        InputError: it is not trusted, cannot be called, or returns something else.
    """
    function = resolve(source, trust=trust)
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {key: value for key, value in vars(options).items() if takes_all or key in parameters}
    try:
        found = function(**arguments)
    except TypeError as error:
        raise InputError(f"{source} could not be called ({error}): give every other parameter a default.") from error
    if isinstance(found, Data):
        return found
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(item, DataLoader) for item in found)):
        raise InputError(f"{source} returned {type(found).__name__}: return Data, or a pair of DataLoaders.")
    train, test = found
    masks = _checked_batch(next(iter(test), None), source)[1].ndim == 3
    return Data(
        name=source,
        train=train,
        test=test,
        classes=_classes(train, test, source),
        image_shape=_image_shape(test, source),
        task="segmentation" if masks else "classification",
    )


def _image_shape(loader: DataLoader, source: str) -> tuple[int, int, int]:
    images, _ = _checked_batch(next(iter(loader), None), source)
    channels, height, width = images.shape[1:]
    return channels, height, width


def _classes(train: DataLoader, test: DataLoader, source: str) -> tuple[str, ...]:
    """Class names of the training set, or else numbers up to the largest label of the test set."""
    names = getattr(train.dataset, "classes", None)
    if names:
        return tuple(str(name) for name in names)
    labels = (_checked_batch(batch, source)[1] for batch in test)
    counted = (found.masked_fill(found == IGNORED, -1) if found.ndim == 3 else found for found in labels)
    largest = max(int(found.max()) for found in counted)
    return tuple(str(label) for label in range(largest + 1))


def _checked_batch(batch: Any, source: str) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        images, labels = batch
        if isinstance(images, Tensor) and images.ndim == 4 and isinstance(labels, Tensor) and labels.ndim in (1, 3):
            return images, labels
    raise InputError(
        f"The loaders of {source} must give batches of images (N, C, H, W) and labels (N,), or masks (N, H, W)."
    )
