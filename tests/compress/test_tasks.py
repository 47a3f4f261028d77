"""What a task asks of a network: losses and accuracies by hand, and tasks of the user's own."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compress.errors import InputError
from compress.tasks import CLASSIFICATION, IGNORED, TASKS, Evaluation, Task, prediction, task_named
from compress.training import Distillation, TrainingConfig, check_fit, evaluate, fit
from compress.training.distillation import distillation_loss, training_loss

SEGMENTATION = TASKS["segmentation"]

# Two classes, one image of 2 x 2 pixels: logit differences 0, ln 3, -ln 3, and a pixel without a class.
SCORES = torch.tensor([[[[0.0, math.log(3)], [0.0, 7.0]], [[0.0, 0.0], [math.log(3), 0.0]]]])
MASK = torch.tensor([[[0, 0], [0, IGNORED]]])
LOSSES = [math.log(2), math.log(4 / 3), math.log(4)]  # of the three pixels with a class


class TestSegmentation:
    def test_the_loss_is_per_pixel_and_leaves_pixels_without_a_class_out(self) -> None:
        assert SEGMENTATION.loss(SCORES, MASK).item() == pytest.approx(sum(LOSSES) / 3)

    def test_an_auxiliary_output_counts_half(self) -> None:
        loss = SEGMENTATION.loss({"aux": SCORES, "out": SCORES}, MASK)
        assert loss.item() == pytest.approx(1.5 * sum(LOSSES) / 3)

    def test_a_mask_without_a_class_has_no_loss(self) -> None:
        scores = SCORES.clone().requires_grad_(True)
        SEGMENTATION.loss(scores, torch.full_like(MASK, IGNORED)).backward()
        assert scores.grad is not None
        assert not scores.grad.any()

    def test_label_smoothing(self) -> None:
        smooth = SEGMENTATION.loss(SCORES[..., :1, :1], MASK[..., :1, :1], label_smoothing=0.2)
        assert smooth.item() == pytest.approx(math.log(2))  # both classes cost the same there

    def test_accuracy_by_hand(self) -> None:
        # Class 0 is first in the tie: right, right, wrong. IoU of class 0: 2 / 3; of class 1: 0 / 1.
        found = SEGMENTATION.evaluation(SEGMENTATION.tally({"out": SCORES}, MASK))
        assert found.top1 == pytest.approx(200 / 3)
        assert found.others == {"mean IoU": pytest.approx(100 / 3)}
        assert found.loss == pytest.approx(sum(LOSSES) / 3)
        assert (found.metric, found.top5, found.samples) == ("pixel accuracy", None, 1)

    def test_a_class_that_never_occurs_does_not_lower_the_mean(self) -> None:
        scores = torch.zeros(1, 3, 1, 2)
        scores[0, 1] = 1.0
        found = SEGMENTATION.evaluation(SEGMENTATION.tally(scores, torch.ones(1, 1, 2, dtype=torch.int64)))
        assert (found.top1, found.others) == (100, {"mean IoU": 100})

    def test_minibatches_add_up(self) -> None:
        loader = DataLoader([(SCORES[0], MASK[0])] * 3, batch_size=2)
        assert evaluate(nn.Identity(), loader, task=SEGMENTATION).samples == 3

    def test_distillation_compares_the_classes_of_every_pixel(self) -> None:
        student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        rows = [logits.permute(0, 2, 3, 1).reshape(-1, 3) for logits in (student, teacher)]
        assert torch.allclose(distillation_loss(student, teacher, 2.0), distillation_loss(*rows, 2.0))
        mask = torch.zeros(2, 4, 5, dtype=torch.int64)
        loss = training_loss(
            {"out": student},
            mask,
            task=SEGMENTATION,
            distillation=Distillation(weight=0.25, temperature=2.0),
            teacher_logits=teacher,
        )
        expected = 0.75 * SEGMENTATION.loss(student, mask) + 0.25 * distillation_loss(student, teacher, 2.0)
        assert torch.allclose(loss, expected)


def test_classification_still_wants_a_tensor_in_training() -> None:
    with pytest.raises(InputError, match="switch its auxiliary outputs off"):
        CLASSIFICATION.loss((SCORES, SCORES), MASK)


@pytest.mark.parametrize("outputs", [(SCORES,), {"logits": SCORES}, [{"boxes": SCORES}], {"out": [SCORES]}])
def test_other_outputs_are_no_prediction(outputs: Any) -> None:
    with pytest.raises(InputError, match='under "out"'):
        prediction(outputs)


class TestFit:
    """`check_fit` for masks."""

    def loader(self, mask: Tensor, images: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(2, 3, 4, 6) if images is None else images, mask)]

    def test_masks_that_fit(self) -> None:
        mask = torch.full((2, 4, 6), IGNORED)
        check_fit(nn.Conv2d(3, 2, 1), self.loader(mask), classes=("a", "b"), task=SEGMENTATION)
        mask[0, 0, 0] = 1
        check_fit(nn.Conv2d(3, 2, 1), self.loader(mask), classes=("a", "b"), task=SEGMENTATION)

    @pytest.mark.parametrize(
        ("model", "mask", "message"),
        [
            (nn.Conv2d(3, 2, 1), torch.zeros(2, 6, 4), "type torch.float32 but must be int64"),
            (nn.Conv2d(3, 2, 1), torch.zeros(2, 6, 4, dtype=torch.int64), "must be one class index per pixel"),
            (nn.Conv2d(3, 2, 1), torch.full((2, 4, 6), 2), "labels go up to 2: set model.kwargs.num_classes: 3"),
            (nn.Conv2d(3, 2, 2, 2), torch.zeros(2, 4, 6, dtype=torch.int64), "scale its output up"),
            (nn.Flatten(), torch.zeros(2, 4, 6, dtype=torch.int64), "choose a segmentation network"),
        ],
    )
    def test_masks_that_do_not_fit(self, model: nn.Module, mask: Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_fit(model, self.loader(mask), task=SEGMENTATION)

    def test_other_classes_than_outputs(self) -> None:
        mask = torch.full((2, 4, 6), IGNORED)
        with pytest.raises(InputError, match="2 outputs but the data have 3 classes"):
            check_fit(nn.Conv2d(3, 2, 1), self.loader(mask), classes=("a", "b", "c"), task=SEGMENTATION)


class Losses(nn.Module):
    """As torchvision's detectors: losses in training mode, findings in evaluation mode, lists of images in both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = [self.weight * image.mean() for image in images]
        if targets is None:
            return [{"value": value} for value in found]
        errors = [(value - target["value"]) ** 2 for value, target in zip(found, targets, strict=True)]
        return {"square": torch.stack(errors).mean(), "decay": 0 * self.weight}


class Regression(Task):
    metric = "within 0.1"

    def inputs(self, images: Any, targets: Any) -> tuple[Any, ...]:
        return images, targets

    def loss(self, outputs: Any, targets: Any, *, label_smoothing: float = 0.0) -> Tensor:
        return outputs["square"] + outputs["decay"]

    def tally(self, outputs: Any, targets: Any) -> tuple[int, int]:
        near = [abs(found["value"] - target["value"]) < 0.1 for found, target in zip(outputs, targets, strict=True)]
        return len(near), sum(map(bool, near))

    def evaluation(self, totals: Any) -> Evaluation:
        images, near = totals
        return Evaluation(100 * near / images, None, None, images, self.metric)


INSTANCE = Regression()
NO_TASK = 3


def needs_an_argument(size: int) -> Task:
    return Regression() if size else INSTANCE


@pytest.fixture
def regression() -> DataLoader:
    data = [(torch.full((3, 2, 2), float(size)), {"value": torch.tensor(2.0 * size)}) for size in (1, 1, 2)]
    return DataLoader(data, batch_size=3, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))


def test_a_network_that_returns_losses_is_trained_and_judged(regression: DataLoader) -> None:
    model = Losses()
    check_fit(model, regression, task=INSTANCE)
    before = evaluate(model, regression, task=INSTANCE)
    assert (before.top1, before.loss, before.metric) == (0.0, None, "within 0.1")
    config = TrainingConfig(epochs=30, learning_rate=0.1, momentum=0, schedule="constant")
    history = fit(model, regression, config, seed=0, task=INSTANCE, test_loader=regression)
    assert model.weight.item() == pytest.approx(2, abs=0.05)
    assert history.epochs[-1].test == Evaluation(100.0, None, None, 3, "within 0.1")
    assert type(history).from_dict(history.as_dict()) == history


def test_a_task_that_cannot_judge_the_model_is_told_before_training(regression: DataLoader) -> None:
    with pytest.raises(InputError, match="The task Regression cannot judge the model on the data"):
        check_fit(nn.Flatten(), regression, task=INSTANCE)


class TestNames:
    def test_built_in(self) -> None:
        assert task_named("classification") is CLASSIFICATION
        assert task_named("segmentation") is SEGMENTATION

    @pytest.mark.parametrize("name", ["INSTANCE", "Regression"])
    def test_the_users_own(self, name: str) -> None:
        assert task_named(f"{__name__}:{name}", trust=("*",)).metric == "within 0.1"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("segmentatoin", "did you mean 'segmentation'"),
            ("depth", "package.module:object"),
            (f"{__name__}:NO_TASK", "is a int: derive its class from compress.tasks.Task"),
            (f"{__name__}:needs_an_argument", "give every parameter a default"),
            (f"{__name__}:Regresion", "did you mean 'Regression'"),
        ],
    )
    def test_no_task(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            task_named(name, trust=("*",))

    def test_no_code_without_leave(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "stranger.py").write_text("raise SystemExit\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="--trust stranger"):
            task_named("stranger:task")
        assert "stranger" not in sys.modules


def test_a_minibatch_of_one_image_and_one_value_per_channel() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.Upsample(scale_factor=4))
    loader = DataLoader([(torch.randn(3, 4, 4), torch.zeros(4, 4, dtype=torch.int64))], batch_size=1)
    with pytest.raises(InputError, match=r"set data.batch_size to 2 or more"):
        fit(model, loader, TrainingConfig(epochs=1), seed=0, task=SEGMENTATION)
