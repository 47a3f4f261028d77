"""Cutting slices out of a live model: values, gradients, optimizer state and size attributes."""

import pytest
import torch
from torch import nn

from compress.errors import WorkError
from compress.removal import Cuts, dense_sizes, keep_slices, kept_slices, shape_update

KEEP = {
    ("0.weight", 0): torch.tensor([0, 2]),
    ("0.bias", 0): torch.tensor([0, 2]),
    ("2.weight", 1): torch.tensor([0, 2]),
}


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.ones(4, 2)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_values_gradients_and_state_are_cut_alike(make) -> None:
    model = chain()
    optimizer = make(model.parameters())
    loss = train_step(model, optimizer)  # held on purpose: its graph remembers the old shapes
    weight = model[0].weight
    expected = {"value": weight.detach()[[0, 2]].clone(), "gradient": weight.grad[[0, 2]].clone()}
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}

    keep_slices(model, KEEP, optimizer)

    assert model[0].weight is weight
    assert torch.equal(weight, expected["value"])
    assert torch.equal(weight.grad, expected["gradient"])
    for key, value in optimizer.state[weight].items():
        assert torch.equal(value, state[key][[0, 2]] if state[key].dim() else state[key]), key
    assert optimizer.state[model[2].weight][next(iter(state))].shape in {(1, 2), ()}
    train_step(model, optimizer)
    assert weight.grad.shape == (2, 2)
    assert loss.isfinite()


def test_size_attributes_follow() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4), nn.PReLU(8))
    keep = torch.tensor([1, 3])
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    twice = torch.tensor([2, 3, 6, 7])
    keep_slices(
        model,
        {(name, 0): keep for name in names} | {(name, 0): twice for name in ("2.weight", "2.bias", "3.weight")},
    )
    convolution, norm, depthwise, prelu = model
    assert (convolution.in_channels, convolution.out_channels) == (4, 2)
    assert norm.num_features == 2
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (2, 4, 2)
    assert prelu.num_parameters == 4
    assert model(torch.ones(1, 4, 8, 8)).shape == (1, 4, 4, 4)


def test_record_composes_over_removals() -> None:
    model = chain()
    keep_slices(model, KEEP)
    second = {slot: torch.tensor([1]) for slot in KEEP}
    keep_slices(model, second)
    assert {slot: positions.tolist() for slot, positions in kept_slices(model).items()} == {slot: [2] for slot in KEEP}
    assert dense_sizes(model) == dict.fromkeys(KEEP, 3)


def test_channels_last_stays() -> None:
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    keep_slices(model, {("weight", 0): torch.tensor([0, 5, 6]), ("bias", 0): torch.tensor([0, 5, 6])})
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_state_that_cannot_be_cut_is_refused_and_nothing_changes() -> None:
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["factored"] = torch.ones(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WorkError, match=r"SGD keeps factored of shape \(3,\) for 0\.weight"):
        keep_slices(model, KEEP, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_users_can_teach_their_own_module() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.size = 4

    @shape_update(Scale)
    def follow(module: Scale, cuts: Cuts) -> None:
        module.size = len(cuts["weight", 0])

    model = nn.Sequential(Scale())
    keep_slices(model, {("0.weight", 0): torch.tensor([1])})
    assert model[0].size == 1


def test_a_module_follows_what_is_cut_inside_it_after_the_modules_inside() -> None:
    class Inner(nn.Linear):
        pass

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale, self.width = Inner(2, 4), nn.Parameter(torch.ones(3)), 4

    seen: list[tuple[int, dict[tuple[str, int], list[int]]]] = []

    @shape_update(Outer)
    def follow(module: Outer, cuts: Cuts) -> None:
        seen.append((module.inner.out_features, {slot: kept.tolist() for slot, kept in cuts.items()}))

    model = nn.Sequential(Outer(), Outer())
    keep_slices(model, {("1.inner.weight", 0): torch.tensor([0, 3]), ("1.scale", 0): torch.tensor([2])})
    assert seen == [(2, {("inner.weight", 0): [0, 3], ("scale", 0): [2]})]


def test_group_norm_loses_whole_groups_or_channels_of_every_group() -> None:
    norm = nn.GroupNorm(2, 8)
    keep_slices(nn.Sequential(norm), {("0.weight", 0): torch.tensor([1, 2, 5, 6]), ("0.bias", 0): torch.arange(4)})
    assert (norm.num_groups, norm.num_channels) == (2, 4)
    keep_slices(nn.Sequential(norm), {("0.weight", 0): torch.tensor([2, 3]), ("0.bias", 0): torch.arange(2)})
    assert (norm.num_groups, norm.num_channels) == (1, 2)


class Tied(nn.Module):
    """Two layers with one weight, a depthwise one with two names, and a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight
        self.depthwise = nn.Conv2d(3, 3, 3, groups=3, padding=1)
        self.again, self.norm = self.depthwise, nn.BatchNorm2d(3)


def test_a_tensor_under_two_names_is_cut_once_and_known_in_both_places() -> None:
    model = Tied()
    keep = {("second.weight", 0): torch.tensor([0, 2]), ("second.bias", 0): torch.tensor([0, 2])}
    keep |= {("again.weight", 0): torch.tensor([1, 2]), ("again.bias", 0): torch.tensor([1, 2])}
    keep_slices(model, keep)
    assert model.second.weight is model.first.weight
    assert model.first.weight.shape == (2, 3, 1, 1)
    assert (model.first.out_channels, model.second.out_channels) == (2, 2)
    assert (model.depthwise.groups, model.depthwise.in_channels) == (2, 2)
    assert set(kept_slices(model)) == {
        *(("first.weight", 0), ("second.bias", 0), ("depthwise.weight", 0), ("depthwise.bias", 0)),
    }
