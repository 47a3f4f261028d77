"""Criteria of second order, against whole Hessians and per-image gradients."""

from collections.abc import Mapping

import pytest
import torch
from gates_by_hand import (
    CLOSE,
    NETS,
    Sigmoid,
    UsedTwice,
    assert_scores,
    by_filters,
    each_net,
    gated,
    gradient_at_one,
    loss_behind,
    minibatch,
    places,
    prepared,
    scores_of,
    weight_gradients,
)
from test_importance import Depthwise, Residual
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, build, second_order


@each_net
def test_taylor_so_and_obd_have_the_gates_own_second_derivative(net: type[nn.Module]) -> None:
    model, graph = prepared(net)
    so, obd = {}, {}
    for group, width in graph.widths.items():
        loss = loss_behind(model, places(net, group))
        diagonal = torch.autograd.functional.hessian(loss, torch.ones(width, dtype=torch.double)).diagonal()
        so[group] = (diagonal / 2 - gradient_at_one(loss, width)).square()
        obd[group] = diagonal / 2
    assert_scores(scores_of("taylor-so", model, graph), so)
    assert_scores(scores_of("obd", model, graph), obd)
    assert any(bool((values < 0).any()) for values in obd.values()) or net is not Depthwise


def test_taylor_so_and_obd_gate_a_channel_with_a_residue_where_taylor_does() -> None:
    model, graph = prepared(Sigmoid)
    assert graph.groups["first"].residue == "second"
    loss = loss_behind(model, [("norm", 0)])
    first = gradient_at_one(loss, 5)
    torch.testing.assert_close(scores_of("taylor", model, graph)["first"], first.square(), **CLOSE)
    diagonal = torch.autograd.functional.hessian(loss, torch.ones(5, dtype=torch.double)).diagonal()
    torch.testing.assert_close(scores_of("obd", model, graph)["first"], diagonal / 2, **CLOSE)
    torch.testing.assert_close(scores_of("taylor-so", model, graph)["first"], (diagonal / 2 - first) ** 2, **CLOSE)


@each_net
def test_taylor_so_full_has_the_row_of_the_hessian_over_all_gates(net: type[nn.Module]) -> None:
    model, graph = prepared(net)
    widths = list(graph.widths.values())

    def loss(gates: Tensor) -> Tensor:
        hooks = {}
        for group, gate in zip(graph.groups, gates.split(widths), strict=True):
            hooks.update(dict.fromkeys([(group, *place) for place in places(net, group)], gate))
        one = minibatch()
        merged: dict[tuple[str, int], Tensor] = {}
        for (_, module, start), gate in hooks.items():
            merged[module, start] = gate
        with gated(model, merged):
            return one.loss(model(*one.inputs))

    start = torch.ones(sum(widths), dtype=torch.double)
    hessian = torch.autograd.functional.hessian(loss, start)
    expected = (hessian @ start / 2 - gradient_at_one(loss, sum(widths))).square()
    scores = scores_of("taylor-so-full", model, graph)
    assert_scores(scores, dict(zip(graph.groups, expected.split(widths), strict=True)))


class Shapes(nn.Module):
    """Convolutions of every kind, and a linear layer on several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(4, 6, 3, padding=(2, 0), dilation=(2, 1), bias=False)
        self.grouped = nn.Conv2d(6, 6, (3, 1), padding="same", groups=2, padding_mode="circular")
        self.upwards = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.tokens = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.dilated(F.relu(self.strided(x))))).relu()
        tokens = self.tokens(self.upwards(x).relu().flatten(2).transpose(1, 2))
        return self.head(F.relu(tokens).mean(1))


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for image in range(8):
        for name, gradient in weight_gradients(model, minibatch(1, slice(image, image + 1))).items():
            found[name] = found.get(name, 0) + gradient.square() / 8
    return found


def by_group_filters(graph: ChannelGraph, of_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group -> sums over its filters, by loops over the positions that the graph names."""
    found = {}
    for name, group in graph.groups.items():
        total = torch.zeros(group.width, dtype=torch.double)
        for part in group.slices:
            if (part.tensor, part.dim) in group.filters:
                for position, channel in zip(part.positions.tolist(), part.channels.tolist(), strict=True):
                    total[channel] += of_weights[part.tensor].select(part.dim, position).sum()
        found[name] = total
    return found


@pytest.mark.parametrize("net", [*NETS, Shapes], ids=lambda net: net.__name__)
def test_hessian_fisher_squares_the_gradient_of_every_image(net: type[nn.Module]) -> None:
    model, graph = prepared(net)
    if net is Shapes:
        assert set(graph.groups) == {"strided", "dilated", "grouped", "upwards", "tokens"}
    fisher = fisher_of(model)
    halves = {name: fisher[name] * weight.detach() ** 2 / 2 for name, weight in model.named_parameters()}
    model.train()  # the criterion runs in evaluation mode all the same
    importance = build("hessian", model, graph)
    importance.observe(minibatch())
    assert_scores(importance.scores(), by_group_filters(graph, halves))


def test_hessian_fisher_takes_images_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = prepared(Shapes)
    expected = scores_of("hessian", model, graph)
    monkeypatch.setattr(second_order, "_PER_EXAMPLE_BYTES", 3 * 8 * 2 * 4 * 9)  # three filters of the first layer
    assert_scores(scores_of("hessian", model, graph), expected)


def test_hessian_fisher_of_a_layer_that_runs_twice_adds_its_gradients_before_squaring() -> None:
    model, graph = prepared(UsedTwice)
    fisher = fisher_of(model)
    halves = {name: fisher[name] * weight.detach() ** 2 / 2 for name, weight in model.named_parameters()}
    assert_scores(scores_of("hessian", model, graph), by_group_filters(graph, halves))


def test_hessian_fisher_mean_and_max_combine_producers() -> None:
    model, graph = prepared(Residual)
    fisher = fisher_of(model)
    for combine in ("mean", "max"):
        expected = by_filters(model, Residual, lambda name, weight: fisher[name] * weight**2 / 2, combine)
        assert_scores(scores_of(f"hessian:combine={combine}", model, graph), expected)


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def smooth() -> tuple[nn.Module, ChannelGraph, Minibatch]:
    torch.manual_seed(0)
    model = Smooth().double().eval()
    points, labels = torch.randn(6, 3, dtype=torch.double), torch.arange(6) % 2
    one = Minibatch((points,), lambda output: F.cross_entropy(output, labels))
    return model, trace(model, points), one


def weight_hessian(model: nn.Module, one: Minibatch) -> tuple[Tensor, Tensor]:
    """Whole Hessian by the weights of `first` and `second`, 24 x 24, and the weights."""
    weights = torch.cat([model.first.weight.detach().flatten(), model.second.weight.detach().flatten()])

    def loss(values: Tensor) -> Tensor:
        given = {"first.weight": values[:12].view(4, 3), "second.weight": values[12:].view(3, 4)}
        return one.loss(functional_call(model, given, one.inputs))

    return torch.autograd.functional.hessian(loss, weights), weights


def test_hessian_hutchinson_is_signs_times_the_hessian_vector_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, one = smooth()
    directions: list[dict[str, Tensor]] = []
    product = second_order._hessian_vector

    def watched(model: nn.Module, minibatch: Minibatch, direction: dict[str, Tensor]) -> object:
        directions.append({name: value.clone() for name, value in direction.items()})
        return product(model, minibatch, direction)

    monkeypatch.setattr(second_order, "_hessian_vector", watched)
    importance = build("hessian:estimator=hutchinson:samples=3", model, graph)
    importance.observe(one)
    assert len(directions) == 3
    hessian, weights = weight_hessian(model, one)
    expected = torch.zeros(24, dtype=torch.double)
    for direction in directions:
        signs = torch.cat([direction["first.weight"].flatten(), direction["second.weight"].flatten()])
        assert set(signs.tolist()) == {-1.0, 1.0}
        expected += signs * (hessian @ signs) / 3
    halves = expected * weights**2 / 2
    scores = importance.scores()
    assert_scores(scores, {"first": halves[:12].view(4, 3).sum(1), "second": halves[12:].view(3, 4).sum(1)})


def test_hessian_hutchinson_approaches_the_exact_diagonal() -> None:
    model, graph, one = smooth()
    importance = build("hessian:estimator=hutchinson:samples=400", model, graph)
    importance.observe(one)
    scores = importance.scores()
    hessian, weights = weight_hessian(model, one)
    halves = hessian.diagonal() * weights**2 / 2
    exact = torch.cat([halves[:12].view(4, 3).sum(1), halves[12:].view(3, 4).sum(1)])
    # The variance of one sample's v_i (H v)_i is the sum of the squares off the diagonal.
    spread = (hessian.square().sum(1) - hessian.diagonal().square()).sqrt() * weights**2 / 2 / 400**0.5
    bound = 4 * torch.cat([spread[:12].view(4, 3).sum(1), spread[12:].view(3, 4).sum(1)])
    assert bool(((torch.cat(list(scores.values())) - exact).abs() <= bound).all())
    assert float(bound.max()) < float(exact.abs().max())


def test_hessian_hutchinson_goes_on_with_its_random_numbers_after_a_resumption() -> None:
    model, graph, one = smooth()
    straight, first = (build("hessian:estimator=hutchinson:seed=3", model, graph) for _ in range(2))
    straight.observe(one)
    straight.observe(one)
    first.observe(one)
    second = build("hessian:estimator=hutchinson:seed=3", model, graph)
    second.load_state_dict(first.state_dict())
    second.observe(one)
    assert_scores(second.scores(), straight.scores())


def test_hessian_draws_by_its_seed() -> None:
    model, graph, one = smooth()
    found = []
    for seed in (0, 0, 1):
        importance = build("hessian:estimator=hutchinson", model, graph, seed=seed)
        importance.observe(one)
        found.append(torch.cat(list(importance.scores().values())))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert importance.signed
    assert not build("hessian", model, graph).signed


@pytest.mark.parametrize("name", ["hessian", "hessian:estimator=hutchinson", "taylor-so-full"])
def test_a_frozen_layer_is_one_sentence(name: str) -> None:
    model, graph = prepared(Residual)
    for layer in (model.stem, model.stem_norm):
        layer.requires_grad_(False)
    importance = build(name, model, graph)
    with pytest.raises(
        (InputError, WorkError), match=r"stem(_norm)?\.weight .*unfreeze the layer, or name it in ignore"
    ):
        importance.observe(minibatch())


@pytest.mark.parametrize("name", ["taylor-so"])
def test_ablations_and_curvatures_of_a_frozen_layer_are_those_of_any_other(name: str) -> None:
    model, graph = prepared(Residual)
    expected = scores_of(name, model, graph)
    model.stem.requires_grad_(False)
    assert_scores(scores_of(name, model, graph), expected)
