"""Data sets held in memory as tensors: whole batches are indexed, augmented and normalised at once.

All randomness comes from torch's global generator, so that seeding it before an epoch repeats the epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

Augmentation = Callable[[Tensor], Tensor]  # float images in [0, 1], (N, C, H, W) -> (N, C, H, W)


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), uint8 or float in [0, 1], and labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """A split that gives float32 images, augmented, resized and normalised, with their labels."""

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.split = split
        self.augmentation = augmentation
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch; `DataLoader` calls this instead of indexing one image at a time."""
        chosen = torch.as_tensor(indices)
        images = self.split.images[chosen]
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.augmentation is not None:
            images = self.augmentation(images)
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = [self.image_size, self.image_size]
            images = functional.interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std, self.split.labels[chosen]


@dataclass(frozen=True)
class RandomAffine:
    """Turn, scale and shift every image of a batch by its own random amounts.

    Units: `degrees` to either side; `scale` around 1 (0.1 draws from [0.9, 1.1]); `shift` as a fraction of
    the side. `padding` is what comes in from outside: "zeros" or "border".
    """

    degrees: float
    scale: float
    shift: float
    padding: str

    def __call__(self, images: Tensor) -> Tensor:
        count = len(images)
        draws = torch.rand(4, count) * 2 - 1  # (4, N) in [-1, 1]
        angle = draws[0] * (self.degrees * math.pi / 180)
        scale = 1 / (1 + self.scale * draws[1])  # the grid maps output to input, so an inverse
        cosine, sine = angle.cos() * scale, angle.sin() * scale
        shift = 2 * self.shift * draws[2:]  # grid coordinates run over [-1, 1]
        rows = [torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)]
        grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)


def crop_and_flip(images: Tensor) -> Tensor:
    """Random crop after 4 pixels of zero padding, and a random flip (He et al. 2016, section 4.2)."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count))
    rows = top[:, None] + torch.arange(height)  # (N, H)
    columns = left[:, None] + torch.arange(width)  # (N, W)
    flipped = torch.rand(count) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    batch = torch.arange(count)[:, None, None]
    # Indices around the channel slice put that dimension last: (N, H, W, C)
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def batch_loader(dataset: TensorImages, *, batch_size: int, train: bool) -> DataLoader:
    """Batches of a split held in memory; worker processes would only add copying."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=drops_last(len(dataset), batch_size, train=train),
        collate_fn=_whole_batch,
    )


def drops_last(count: int, batch_size: int, *, train: bool) -> bool:
    """Whether to leave out the last, short batch: in training, as batch normalisation fails on one image.

    A split smaller than one batch is kept.
    """
    return train and count > batch_size


def _whole_batch(batch: Any) -> Any:
    """What `__getitems__` gave: nothing is left to collate."""
    return batch
