import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import InputError
from compress.training.preflight import check_fit


def classifier(outputs=10):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, outputs),
    )


def loader_of(images, labels, batch_size=2):
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


IMAGES = torch.zeros(4, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 9])


def test_data_that_fit_leave_the_model_as_it_was():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_fit(model, loader_of(IMAGES, LABELS), classes=[str(digit) for digit in range(10)])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(4, 1, 8, 8),
            LABELS,
            r"takes images of 3 channels but the data have 1: set model\.kwargs\.in_channels: 1",
        ),
        (torch.zeros(4, 3, 4, 4), LABELS, r"cannot take images of 3x4x4 \(.+\): set data\.image_size"),
        (
            IMAGES,
            torch.tensor([0, 1, 2, 99]),
            r"10 outputs but the labels go up to 99: set model\.kwargs\.num_classes: 100",
        ),
        (IMAGES, torch.tensor([0, -1, 2, 3]), "go down to -1"),
        (IMAGES.to(torch.uint8), LABELS, r"type torch\.uint8 but must be floating point"),
        (IMAGES, LABELS.to(torch.float32), r"type torch\.float32 but must be int64"),
        (IMAGES, LABELS[:, None], "shape 2x1 for 2 images"),
        (IMAGES[:0], LABELS[:0], r"no batch: data\.source is empty"),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(images, labels, message):
    with pytest.raises(InputError, match=message):
        check_fit(classifier(), loader_of(images, labels))


def test_classes_and_outputs_must_agree():
    with pytest.raises(InputError, match=r"10 outputs but the data have 2 classes: set model\.kwargs\.num_classes: 2"):
        check_fit(classifier(), loader_of(IMAGES, LABELS % 2), classes=("cat", "dog"))


def test_labels_are_checked_beyond_the_first_batch_only_where_listed():
    unlisted = [(IMAGES[:2], LABELS[:2]), (IMAGES[:2], torch.tensor([0, 99]))]
    check_fit(classifier(), unlisted)
    with pytest.raises(InputError, match="up to 99"):
        check_fit(classifier(), unlisted[1:])


def test_a_model_for_another_image_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    with pytest.raises(InputError, match=r"3x8x8 \(.*mat1 and mat2.+\): set data\.image_size"):
        check_fit(model, loader_of(IMAGES, LABELS))


def test_outputs_that_are_no_logits():
    with pytest.raises(InputError, match=r"returns a tensor of 2x4x6x6 .+ model\.factory"):
        check_fit(classifier()[:1], loader_of(IMAGES, LABELS))


def test_batches_that_are_no_pairs():
    with pytest.raises(InputError, match="pairs of tensors"):
        check_fit(classifier(), [IMAGES])
