import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.errors import InputError
from compress.training.schedule import TrainingConfig, build_optimizer, learning_rate


def rates(config, steps_per_epoch, steps):
    return [learning_rate(config, step, steps_per_epoch) for step in steps]


def test_paper_recipe_drops_by_ten_at_epochs_ten_and_twenty():
    config = TrainingConfig(epochs=25, learning_rate=0.01, schedule="step", step_epochs=(10, 20), step_factor=0.1)
    assert rates(config, 7, [0, 69, 70, 139, 140, 174]) == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_warm_up_is_linear_and_reaches_the_full_rate():
    config = TrainingConfig(epochs=4, learning_rate=0.8, schedule="constant", warmup_epochs=2)
    # 2 epochs of 2 steps: 1/4, 2/4, 3/4, 4/4 of 0.8, then constant.
    assert rates(config, 2, range(6)) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_halves_the_rate_half_way():
    config = TrainingConfig(epochs=4, learning_rate=1.0, schedule="cosine")
    # cos(pi/4) = 0.70711 after a quarter.
    assert rates(config, 2, [0, 2, 4, 6]) == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_cosine_counts_from_the_end_of_a_fractional_warm_up():
    config = TrainingConfig(epochs=2, learning_rate=1.0, schedule="cosine", warmup_epochs=0.5)
    # 4 steps an epoch: 2 of warm-up, then 6 of cosine; its third is half way.
    assert rates(config, 4, [0, 1, 2, 5]) == pytest.approx([0.5, 1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "step_epochs and schedule"),
        ({"schedule": "cosine", "step_epochs": [3]}, "step_epochs and schedule"),
        ({"schedule": "step", "step_epochs": [10, 30], "epochs": 25}, "between 0 and epochs"),
        ({"warmup_epochs": 25}, "must be below epochs"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov needs"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"lr": 0.1}, "lr"),
        ({"precision": True}, "precision"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**settings)


def test_the_bare_no_of_yaml_is_understood():
    assert TrainingConfig(precision=False).precision == "no"


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizer_takes_its_settings_and_skips_frozen_parameters(name, kind):
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, learning_rate=0.3, weight_decay=0.02))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 1
    assert group["params"][0] is model.weight
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.02)


def test_nesterov_reaches_the_optimizer():
    optimizer = build_optimizer(nn.Linear(2, 2), TrainingConfig(momentum=0.8, nesterov=True))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.8, True)


def test_a_frozen_model_is_refused():
    with pytest.raises(InputError, match="unfreeze"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainingConfig())
