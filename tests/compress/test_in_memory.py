"""Batches from tensors: normalisation and augmentation, checked pixel by pixel."""

import torch

from compress.data.in_memory import RandomAffine, Split, TensorImages, batch_loader, crop_and_flip


def test_single_images_equal_those_of_a_batch() -> None:
    split = Split(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4))
    dataset = TensorImages(split, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), image_size=8)
    images, labels = next(iter(batch_loader(dataset, batch_size=4, train=False)))
    assert torch.equal(dataset[2][0], images[2])
    assert labels.tolist() == [0, 1, 2, 3]
    expected = (split.images[1, 2].float() / 255 - 0.3) / 0.2
    assert torch.allclose(images[1, 2], expected)


def test_crop_and_flip_takes_one_of_the_windows() -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 2, 6, 5)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    flips = 0
    for padded_image, result in zip(padded, crop_and_flip(images), strict=True):
        windows = [padded_image[:, y : y + 6, x : x + 5] for y in range(9) for x in range(9)]
        plain = any(torch.equal(window, result) for window in windows)
        flipped = any(torch.equal(window.flip(2), result) for window in windows)
        assert plain or flipped
        flips += flipped and not plain
    assert 15 < flips < 45


def test_affine_without_amounts_changes_nothing() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(RandomAffine(0, 0, 0, "zeros")(images), images, atol=1e-5)


def test_affine_shifts_by_no_more_than_asked() -> None:
    images = torch.zeros(100, 1, 32, 32)
    images[:, :, 16, 16] = 1
    moved = RandomAffine(degrees=0, scale=0, shift=2 / 32, padding="zeros")(images)
    rows = torch.arange(32.0)
    centres = (moved.sum(3)[:, 0] * rows).sum(1) / moved.sum((1, 2, 3))  # (N,) of ink, in pixels
    assert (centres - 16).abs().max() <= 2 + 1e-3
    assert (centres - 16).abs().max() > 1.5
