"""Label tensors: integers in the shape of an activation that name the channel of every element.

An axis along which labels are equal has stride 0 (`torch.Tensor.expand`), so an activation costs memory and time for
its channels, not for its pixels.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

NO_CHANNEL = -1
"""Label of an element that belongs to no channel (a constant, a mask, an index)."""


def compact(labels: Tensor) -> Tensor:
    """Narrow every axis of stride 0 to size 1: (N, C, H, W) whose labels follow C only -> (1, C, 1, 1)."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand to `shape` after making stride 0 every axis along which the labels turn out to be equal."""
    size = labels.untyped_storage().nbytes()
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first
    labels = compact(labels)
    if labels.nbytes < size // 2:  # let go of the rest, as a reshape has copied it
        labels = labels.clone()
    return labels.expand(tuple(shape))


def reshaped(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """`labels.reshape(shape)`, without a copy for every position along an axis that stays as it is."""
    narrow, sizes = labels, list(shape)
    for dim, size in enumerate(labels.shape):
        if size > 1 and labels.stride(dim) == 0:
            for other in range(len(shape)):
                if shape[other] == size and prod(shape[:other]) == prod(labels.shape[:dim]):
                    narrow, sizes[other] = narrow.narrow(dim, 0, 1), 1
                    break
    return narrow.reshape(sizes).expand(tuple(shape))


def varying(labels: Tensor) -> list[int]:
    """The axes along which labels differ."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0]


def blank(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor without channels."""
    return torch.full((1,) * len(shape), NO_CHANNEL).expand(tuple(shape))


def first_along(labels: Tensor, dim: int) -> Tensor:
    """The labels at index 0 of `dim`, expanded to its size."""
    return labels.narrow(dim, 0, 1).expand(labels.shape) if labels.shape[dim] else labels


def along_only(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of `shape` that follow `vector`, (size of dim,), along `dim` and are equal along the other axes."""
    view = [1] * len(shape)
    view[dim] = -1
    return spread(vector.view(view), shape)
