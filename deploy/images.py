"""From a user's images to what the network was trained on: the pre-processing that an artefact records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from compress.errors import InputError
from deploy.metadata import Metadata

_ROUNDING = 1e-4  # by which resizing and half precision may leave [0, 1]

_EIGHT_BIT = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
"""Pillow's modes whose conversion keeps the brightness; those of 16 and 32 bits would be clipped."""


def split_images(images: Any, channels: int) -> list[Tensor]:
    """Each image as a tensor (C, H, W), uint8 or float32 in [0, 1], as large as it was given.

    Takes one image or several: NumPy (H, W), (H, W, C), (N, H, W) or (N, H, W, C); torch (H, W), (C, H, W) or
    (N, C, H, W); Pillow; or a list of single images, which may differ in size. Pixels are uint8, or floats in [0, 1].
    A grey image becomes one of three equal channels where the network takes three.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(images, list | tuple):
        found = [_single(image, channels) for image in images]
    elif isinstance(images, Image.Image):
        found = [_single(images, channels)]
    else:
        found = list(_several(images, channels))
    if not found:
        raise InputError("There is no image to classify: give at least one.")
    return found


def prepare(image: Tensor, about: Metadata) -> Tensor:
    """One image (C, H, W) as the network takes it: float32, of the recorded size, normalised.

    An image of the recorded size is not resized. Another one is treated as the test images were: brought to `resize`
    on its shorter side and cut out at the centre, or stretched as a whole where there was no `resize`.
    """
    size = about.image_shape[1:]
    if tuple(image.shape[1:]) != size:
        if about.resize is not None:
            image = _resized_and_cut(image, about.resize, size)
        else:
            pixels = _in_unit_range(image)[None]
            image = functional.interpolate(pixels, list(size), mode="bilinear", antialias=True)[0]
    pixels = _in_unit_range(image)
    if about.mean:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (about.mean, about.std))
        pixels = (pixels - mean) / std
    return pixels


def _resized_and_cut(image: Tensor, shorter_side: int, size: Sequence[int]) -> Tensor:
    transform = v2.Compose([v2.Resize(shorter_side, antialias=True), v2.CenterCrop(list(size))])
    # Pillow resizes image files in training and testing; its rounding of bytes differs from torchvision's.
    if image.dtype == torch.uint8 and len(image) in (1, 3):
        cut: Tensor = pil_to_tensor(transform(to_pil_image(image)))
    else:
        cut = transform(image)
    return cut


def _in_unit_range(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _single(image: Any, channels: int) -> Tensor:
    if isinstance(image, Image.Image):
        return _from_pillow(image, channels)
    tensor = _tensor(image)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim != 3:
        raise InputError(f"An image in a list has shape {tuple(tensor.shape)}, but each must be a single image.")
    elif isinstance(image, np.ndarray):
        tensor = tensor.permute(2, 0, 1)
    return _with_channels(tensor[None], channels, _layout(image, listed=True))[0]


def _several(images: Any, channels: int) -> Tensor:
    """(N, C, H, W) from one array or tensor of one image or of several."""
    tensor = _tensor(images)
    shape = tuple(tensor.shape)
    layout = _layout(images, listed=False)
    if tensor.ndim == 2:
        tensor = tensor[None, None]
    elif tensor.ndim not in (3, 4):
        raise InputError(f"The images have shape {shape}, but {layout} is needed.")
    elif isinstance(images, torch.Tensor):
        tensor = tensor if tensor.ndim == 4 else tensor[None]
    elif tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2)
    elif shape[-1] in (1, 3, 4, channels):
        tensor = tensor.permute(2, 0, 1)[None]
    else:
        tensor = tensor[:, None]
    return _with_channels(tensor, channels, layout)


def _tensor(image: Any) -> Tensor:
    """On the CPU, uint8 or float32 in [0, 1]."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise InputError(
            f"A {type(image).__name__} is no image: give a NumPy array, a torch tensor, a Pillow image, or a list of "
            "them."
        )
    if isinstance(image, np.ndarray):
        known = image.dtype == np.uint8 or image.dtype.kind == "f"
    else:
        known = image.dtype == torch.uint8 or image.dtype.is_floating_point
    if isinstance(image, torch.Tensor) and (image.is_sparse or image.is_meta):
        raise InputError("A sparse tensor, or one without data, is no image: give a dense one.")
    if not known:
        raise InputError(f"The pixels are {image.dtype}: give uint8 from 0 to 255, or floats from 0 to 1.")
    if isinstance(image, np.ndarray):
        # PyTorch takes neither foreign byte orders nor backward strides nor read-only memory.
        image = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32))
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    if image.numel():
        low, high = image.min().item(), image.max().item()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise InputError(
                f"Float pixels must lie in [0, 1], and these lie in [{low:g}, {high:g}]: divide by 255 if they are "
                "bytes, and do not normalise them, which is done here."
            )
    return image


def _from_pillow(image: Image.Image, channels: int) -> Tensor:
    if 0 in image.size:
        raise InputError("An image has no pixels: give at least one row and one column.")
    if image.mode not in _EIGHT_BIT:
        raise InputError(f"A Pillow image has mode {image.mode}: scale it to 8 bits per channel, as mode L or RGB.")
    if channels not in (1, 3):
        raise InputError(f"The network takes {channels} channels, which Pillow images do not have: give arrays.")
    tensor: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return tensor


def _with_channels(images: Tensor, channels: int, layout: str) -> Tensor:
    """(N, C, H, W) with as many channels as the network takes."""
    if 0 in images.shape[1:]:
        raise InputError("An image has no pixels: give at least one row and one column.")
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    raise InputError(
        f"The images have {images.shape[1]} channels and the network takes {channels}: convert them, and order the "
        f"dimensions as {layout}."
    )


def _layout(image: Any, *, listed: bool) -> str:
    if isinstance(image, torch.Tensor):
        return "(H, W) or (C, H, W) in torch" if listed else "(H, W), (C, H, W) or (N, C, H, W) in torch"
    return "(H, W) or (H, W, C) in NumPy" if listed else "(H, W), (H, W, C), (N, H, W) or (N, H, W, C) in NumPy"
