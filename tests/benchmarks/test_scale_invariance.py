"""Scores of a two-layer net: invariant under (λW, V/λ) or not, and right by hand and by brute force."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.studies.scale_experiment import layer_importance, train
from benchmarks.studies.two_layer import (
    CRITERIA,
    TwoLayer,
    hessian,
    loss_changes,
    natural,
    prune_units,
    prune_weights,
    taylor,
    unit_loss_changes,
)

LAMBDAS = (0.01, 0.5, 10.0, 300.0)


@pytest.fixture
def net() -> TwoLayer:
    generator = torch.Generator().manual_seed(0)
    return TwoLayer(
        torch.randn(5, 4, generator=generator, dtype=torch.float64),
        torch.randn(3, 5, generator=generator, dtype=torch.float64),
    )


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(70, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (70,), generator=generator)


@pytest.mark.parametrize("factor", LAMBDAS)
def test_scaling_keeps_function_and_natural_importance(net, data, factor):
    scaled = net.scaled(factor)
    torch.testing.assert_close(scaled.logits(data[0]), net.logits(data[0]), rtol=1e-12, atol=1e-12)
    before, after = natural(net, *data), natural(scaled, *data)
    torch.testing.assert_close(after.hidden, before.hidden, rtol=0, atol=1e-13)
    torch.testing.assert_close(after.output, before.output, rtol=0, atol=1e-13)


@pytest.mark.parametrize("factor", LAMBDAS)
@pytest.mark.parametrize("criterion", ["hessian", "taylor", "oracle"])
def test_scaling_keeps_scores_of_weights_and_units(net, data, factor, criterion):
    before, after = (CRITERIA[criterion].weights(each, *data) for each in (net, net.scaled(factor)))
    torch.testing.assert_close(after.hidden, before.hidden, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(after.output, before.output, rtol=1e-9, atol=1e-14)
    units = [CRITERIA[criterion].units(each, *data) for each in (net, net.scaled(factor))]
    torch.testing.assert_close(units[1], units[0], rtol=1e-9, atol=1e-14)


def test_scaling_moves_magnitudes(net, data):
    before, after = (CRITERIA["magnitude"].weights(each, *data) for each in (net, net.scaled(10)))
    torch.testing.assert_close(after.hidden, 100 * before.hidden)
    torch.testing.assert_close(after.output, before.output / 100)


def test_one_unit_by_hand():
    # x = 1, w = 2, V = (ln 3 / 2, 0): logits (ln 3, 0), p = (3/4, 1/4), the true class is 0, loss = ln(4/3).
    net = TwoLayer(
        torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[math.log(3) / 2], [0.0]], dtype=torch.float64)
    )
    x, labels = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    # Without w, or without V_0, both logits are 0 and the loss is ln 2; V_1 is 0 already.
    changes = loss_changes(net, x, labels)
    assert changes.hidden.item() == pytest.approx(math.log(2) - math.log(4 / 3))
    assert changes.output.flatten().tolist() == pytest.approx([math.log(2) - math.log(4 / 3), 0])
    assert unit_loss_changes(net, x, labels).tolist() == pytest.approx([math.log(2) - math.log(4 / 3)])
    # H = p₀ p₁ times the squared slope of the logit: V_0 for w, h = 2 for V_0; w V_0 = h V_0 = ln 3.
    scores = hessian(net, x, labels)
    assert scores.hidden.item() == pytest.approx(3 / 16 * math.log(3) ** 2)
    assert scores.output.flatten().tolist() == pytest.approx([3 / 16 * math.log(3) ** 2, 0])
    # ∂E/∂logit_0 = p₀ − 1 = −1/4
    assert taylor(net, x, labels).hidden.item() == pytest.approx((math.log(3) / 4) ** 2)


def test_loss_changes_equal_those_of_zeroing_one_weight_at_a_time(net, data):
    changes = loss_changes(net, *data)
    for layer in ("hidden", "output"):
        weights = getattr(net, layer)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
            cut = {"hidden": net.hidden.clone(), "output": net.output.clone()}
            cut[layer][tuple(index)] = 0
            expected = TwoLayer(**cut).loss(*data) - net.loss(*data)
            assert getattr(changes, layer)[tuple(index)].item() == pytest.approx(expected, abs=1e-13)
    torch.testing.assert_close(natural(net, *data).hidden, changes.hidden.abs())  # minibatches of unequal size


def test_unit_changes_equal_those_of_removing_one_unit(net, data):
    for unit, change in enumerate(unit_loss_changes(net, *data).tolist()):
        scores = torch.ones(5)
        scores[unit] = 0
        assert change == pytest.approx(prune_units(net, scores, 0.2).loss(*data) - net.loss(*data), abs=1e-13)


def test_hessian_is_the_exact_diagonal(net, data):
    def loss(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return cross_entropy(TwoLayer(hidden, output).logits(data[0]), data[1])

    blocks = torch.autograd.functional.hessian(loss, (net.hidden, net.output))
    scores = hessian(net, *data)
    for index, (weights, score) in enumerate([(net.hidden, scores.hidden), (net.output, scores.output)]):
        diagonal = blocks[index][index].reshape(weights.numel(), weights.numel()).diagonal()
        torch.testing.assert_close(score.flatten(), diagonal * weights.flatten() ** 2)


def test_pruning_ranks_both_layers_together():
    net = TwoLayer(torch.tensor([[3.0, 0.2]]), torch.tensor([[0.1], [2.0]]))
    pruned = prune_weights(net, TwoLayer(net.hidden**2, net.output**2), 0.5)
    assert pruned.hidden.tolist() == [[3.0, 0.0]]
    assert pruned.output.tolist() == [[0.0], [2.0]]


def test_starts_of_one_seed_are_one_function_and_training_separates_them(data, monkeypatch):
    monkeypatch.setattr("benchmarks.studies.scale_experiment.EPOCHS", 1)
    x = torch.rand(20, 64, dtype=torch.float64)
    (start, end), (scaled_start, scaled_end) = train(1.0, 0), train(10.0, 0)
    torch.testing.assert_close(scaled_start.logits(x), start.logits(x))
    assert (scaled_end.logits(x) - end.logits(x)).abs().max() > 0.1


def test_a_layer_that_does_nothing_has_no_importance(net, data):
    idle = TwoLayer(torch.zeros_like(net.hidden), net.output)
    assert layer_importance(idle, *data) == [0, 0]
