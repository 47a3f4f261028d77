"""What a data source gives, and what it is asked for."""

from dataclasses import dataclass

from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Data:
    """A data set ready to train on.

    The loaders give images float32 (N, C, H, W), normalised with `mean` and `std` per channel, and labels
    int64 (N,), or masks int64 (N, H, W) where `task` is "segmentation"; another `task`, package.module:object, says
    itself what they give (`compress.tasks`). `mean` and `std` are empty where a user's loaders do not tell theirs.
    `resize` is the side in pixels that the shorter side of a test image is brought to before the centre is cut out;
    None where the whole image is brought to `image_shape`.
    """

    name: str
    train: DataLoader
    test: DataLoader
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # C, H, W
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    task: str = "classification"


@dataclass(frozen=True)
class Options:
    """What `load` was asked for, as a source sees it; the meaning of each field is in `sources.load`."""

    batch_size: int
    image_size: int | None
    workers: int
    augment: bool
    seed: int
