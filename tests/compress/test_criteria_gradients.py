"""Criteria on weights and their gradients, against explicit gates and sums by hand."""

import pytest
import torch
from gates_by_hand import (
    CLOSE,
    assert_scores,
    by_filters,
    each_net,
    gradient_at_one,
    loss_behind,
    minibatch,
    ones,
    prepared,
    scores_of,
    weight_gradients,
)
from test_importance import GATES, Plain, Residual, batch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.graph import trace
from compress.importance import build

# --- first order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_taylor_mean_and_max_square_the_gate_of_each_producer_first(combine: str) -> None:
    model, graph = prepared(Residual)
    scores = scores_of(f"taylor:combine={combine}", model, graph)
    squares = torch.stack(
        [gradient_at_one(loss_behind(model, [(module, 0)]), 6).square() for module in ("stem_norm", "outer_norm")]
    )
    inner = gradient_at_one(loss_behind(model, [("inner_norm", 0)]), 5).square()
    assert_scores(scores, {"stem": squares.mean(0) if combine == "mean" else squares.amax(0), "inner": inner})


class Stream(nn.Module):
    """A residual stream of four additions, the first behind a projection, with a gate that one can lay behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.body_norm = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.shortcut, self.shortcut_norm = nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.inner = nn.ModuleList(nn.Conv2d(5, 3, 3, padding=1) for _ in range(3))
        self.outer = nn.ModuleList(nn.Conv2d(3, 5, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        factor = 1 if gate is None else gate.view(1, -1, 1, 1)
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(self.body_norm(self.body(x)) + self.shortcut_norm(self.shortcut(x))) * factor
        for inner, outer, norm in zip(self.inner, self.outer, self.norms, strict=True):
            x = F.relu(x + norm(outer(F.relu(inner(x))))) * factor
        return self.head(x.mean((2, 3)))


class StemmedStream(nn.Module):
    """A residual stream that begins at the stem; two additions come behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.inner = nn.ModuleList(nn.Conv2d(5, 3, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(3, 5, 3, padding=1) for _ in range(2))  # without normalisation
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        factor = 1 if gate is None else gate.view(1, -1, 1, 1)
        x = F.relu(self.stem_norm(self.stem(x))) * factor
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = F.relu(x + outer(F.relu(inner(x)))) * factor
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("net", "group", "number"), [(Stream, "body", 4), (StemmedStream, "stem", 3)])
def test_taylor_shared_gate_is_one_gate_behind_every_addition(
    net: type[nn.Module], group: str, number: int, training: bool
) -> None:
    model, graph = prepared(net)
    assert graph.widths[group] == 5
    model.train(training)
    images, labels = batch(1)
    gate = ones(5)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images, gate), labels), gate)
    scores = scores_of("taylor:combine=shared-gate", model, graph)
    torch.testing.assert_close(scores[group], gradient.square() / number, rtol=1e-5, atol=1e-14)


@each_net
def test_taylor_shared_gate_is_the_joint_gate_where_nothing_is_added(net: type[nn.Module]) -> None:
    model, graph = prepared(net)
    shared, joint = scores_of("taylor:combine=shared-gate", model, graph), scores_of("taylor", model, graph)
    for name in graph.groups:
        if len(GATES[net][name]) == 1:
            torch.testing.assert_close(shared[name], joint[name], **CLOSE)


@each_net
@pytest.mark.parametrize("combine", ["joint", "mean", "max"])
def test_taylor_weight_squares_weight_times_gradient_one_by_one(net: type[nn.Module], combine: str) -> None:
    model, graph = prepared(net)
    gradients = weight_gradients(model, minibatch())
    scores = scores_of(f"taylor-weight:combine={combine}", model, graph)
    assert_scores(scores, by_filters(model, net, lambda name, weight: (weight * gradients[name]) ** 2, combine))


@pytest.mark.parametrize("combine", ["joint", "mean", "max"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_bn_taylor_squares_the_gate_of_each_normalisation(combine: str, training: bool) -> None:
    model, graph = prepared(Residual)
    model.train(training)
    rows = torch.stack(
        [gradient_at_one(loss_behind(model, [(module, 0)]), 6).square() for module in ("stem_norm", "outer_norm")]
    )
    inner = gradient_at_one(loss_behind(model, [("inner_norm", 0)]), 5).square()
    scores = scores_of(f"bn-taylor:combine={combine}", model, graph)
    stem = {"joint": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}[combine]
    assert_scores(scores, {"stem": stem, "inner": inner})


# --- weights alone ---------------------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("combine", ["joint", "mean", "max"])
def test_magnitude_adds_up_squares_or_absolute_values(net: type[nn.Module], combine: str) -> None:
    model, graph = prepared(net)
    squares = by_filters(model, net, lambda _, weight: weight * weight, combine)
    sizes = by_filters(model, net, lambda _, weight: weight.abs(), combine)
    assert_scores(scores_of(f"magnitude:combine={combine}", model, graph), squares)
    assert_scores(scores_of(f"magnitude:norm=l1:combine={combine}", model, graph), sizes)


def test_magnitude_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[3.0, -4.0], [0.5, 0.0]])
    model[0].bias.data = torch.tensor([100.0, 100.0])  # does not count
    graph = trace(model, torch.ones(1, 2))
    for text, expected in (("magnitude", [25.0, 0.25]), ("magnitude:norm=l1", [7.0, 0.5])):
        importance = build(text, model, graph)
        importance.observe()
        assert importance.scores()["0"].tolist() == expected


def test_bn_scale_is_the_size_of_the_scale() -> None:
    model, graph = prepared(Residual)
    with torch.no_grad():
        model.stem_norm.weight.copy_(torch.tensor([1.0, -2, 3, 0, 5, -6]))
        model.outer_norm.weight.copy_(torch.tensor([0.5, 0.5, -4, 0, 1, 1]))
        model.inner_norm.weight.copy_(torch.tensor([-1.0, 0, 1, 2, 3]))
    inner = torch.tensor([1.0, 0, 1, 2, 3])
    for combine, stem in {
        "joint": [1.5, 2.5, 7, 0, 6, 7],
        "mean": [0.75, 1.25, 3.5, 0, 3, 3.5],
        "max": [1.0, 2, 4, 0, 5, 6],
    }.items():
        scores = scores_of(f"bn-scale:combine={combine}", model, graph)
        assert_scores(scores, {"stem": torch.tensor(stem), "inner": inner})


def test_random_is_reproducible_and_a_channel_keeps_its_number() -> None:
    model, graph = prepared(Plain)
    importance = build("random", model, graph)
    importance.observe()
    before = importance.scores()
    assert_scores(scores_of("random", model, graph), before)
    assert not torch.equal(scores_of("random:seed=1", model, graph)["first"], before["first"])
    drawn = torch.cat(list(before.values()))
    assert len(set(drawn.tolist())) == len(drawn)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    removals, widths = {"first": torch.tensor([1, 4]), "hidden": torch.tensor([0])}, graph.widths
    graph.remove_from(model, removals)
    importance.removed(removals, widths)
    importance.observe()
    after = importance.scores()
    assert_scores(
        after, {"first": before["first"][[0, 2, 3]], "second": before["second"], "hidden": before["hidden"][1:]}
    )
