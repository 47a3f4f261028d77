"""Criteria on activations and their gradients, against explicit gates, image by image."""

import pytest
import torch
from gates_by_hand import (
    UsedTwice,
    assert_scores,
    each_net,
    gradient_at_one,
    loss_behind,
    minibatch,
    places,
    prepared,
    scores_of,
)
from test_importance import Residual, backward, batch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.graph import ChannelGraph
from compress.importance import build
from compress.modes import aside


@each_net
@pytest.mark.parametrize("combine", ["joint", "mean", "max"])
def test_taylor_fg_squares_the_gate_gradient_of_every_image(net: type[nn.Module], combine: str) -> None:
    model, graph = prepared(net)
    expected = {}
    for group, width in graph.widths.items():
        squares = []
        for image in range(8):
            alone = minibatch(1, slice(image, image + 1))
            each = [gradient_at_one(loss_behind(model, [place], alone), width) for place in places(net, group)]
            squares.append(torch.stack([sum(each)] if combine == "joint" else each).square())
        of_producers = torch.stack(squares).mean(0)
        expected[group] = of_producers.amax(0) if combine == "max" else of_producers.mean(0)
    assert_scores(scores_of(f"taylor-fg:combine={combine}", model, graph), expected)


@each_net
def test_taylor_fg_in_training_mode_gates_one_image_of_the_minibatch(net: type[nn.Module]) -> None:
    model, graph = prepared(net)
    model.train()
    expected = {}
    for group, width in graph.widths.items():
        of_images = gradient_at_one(loss_behind(model, places(net, group)), 8, width)
        expected[group] = (8 * of_images).square().mean(0)
    assert_scores(scores_of("taylor-fg", model, graph), expected)


@each_net
@pytest.mark.parametrize("combine", ["joint", "mean", "max"])
def test_taylor_output_is_the_mean_size_of_activation_times_gradient(net: type[nn.Module], combine: str) -> None:
    model, graph = prepared(net)
    raw = {}
    for group, width in graph.widths.items():
        layers = []
        for module, start in places(net, group):
            rows = torch.zeros(width, dtype=torch.double)
            for image in range(8):
                outputs: list[Tensor] = []
                hook = model.get_submodule(module).register_forward_hook(lambda *args: outputs.append(args[2]))  # noqa: B023
                alone = minibatch(1, slice(image, image + 1))
                loss = alone.loss(model(*alone.inputs))
                hook.remove()
                (gradient,) = torch.autograd.grad(loss, outputs[0])
                for channel in range(width):
                    product = outputs[0][0, start + channel] * gradient[0, start + channel]
                    rows[channel] += product.detach().abs().mean() / 8
            layers.append(rows)
        stacked = torch.stack(layers)
        raw[group] = {"joint": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[combine]
    text = f"taylor-output:combine={combine}"
    assert_scores(scores_of(f"{text}:normalise=false", model, graph), raw)
    normalised = {name: values / values.square().sum().sqrt() for name, values in raw.items()}
    assert_scores(scores_of(text, model, graph), normalised)


def fg(model: nn.Module, graph: ChannelGraph, seeds: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    importance = build("taylor-fg", model, graph)
    for seed in seeds:
        backward(model, seed)
    importance.observe()
    importance.close()
    return importance.scores()


class InPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.act, self.second, self.head = nn.ReLU(inplace), nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.norm(self.first(x))))).mean((2, 3)))


@pytest.mark.parametrize("name", ["taylor-fg", "taylor-output", "hessian"])
def test_activations_in_place_behind_the_layer_do_not_disturb(name: str) -> None:
    plain, graph = prepared(lambda: InPlace(False))
    writing, same = prepared(lambda: InPlace(True))
    assert_scores(scores_of(name, writing, same), scores_of(name, plain, graph))


@pytest.mark.parametrize("name", ["taylor-fg", "taylor-output"])
def test_passes_without_gradients_or_backward_and_passes_of_other_criteria_are_not_recorded(name: str) -> None:
    model, graph = prepared(Residual)
    expected = scores_of(name, model, graph)
    importance = build(name, model, graph)
    others = [
        build(other, model, graph) for other in ("hessian", "hessian:estimator=hutchinson", "taylor-so", "oracle")
    ]
    with torch.no_grad():
        model(batch(2)[0])
    for other in others:
        other.observe(minibatch(2))
    backward(model, 1)
    for other in others:
        other.observe(minibatch(2))
    with aside(model):
        minibatch(3).loss(model(batch(3)[0])).backward()
    with torch.no_grad():
        model(batch(2)[0])
    model(batch(4)[0])  # no backward
    importance.observe()
    importance.close()
    assert_scores(importance.scores(), expected)


def test_several_forward_passes_before_one_observe_are_separate_images() -> None:
    model, graph = prepared(Residual)
    together, apart = fg(model, graph, (1, 2, 3)), [fg(model, graph, (seed,)) for seed in (1, 2, 3)]
    assert_scores(together, {name: sum(one[name] for one in apart) / 3 for name in together})


def test_forward_passes_whose_backward_comes_later_keep_their_own_images() -> None:
    model, graph = prepared(Residual)
    expected = fg(model, graph, (1, 2))
    importance = build("taylor-fg", model, graph)
    losses = [minibatch(seed).loss(model(batch(seed)[0])) for seed in (1, 2)]
    sum(losses).backward()
    importance.observe()
    importance.close()
    assert_scores(importance.scores(), expected)


def test_taylor_fg_of_a_layer_that_runs_twice_has_one_gate_at_both_places() -> None:
    model, graph = prepared(UsedTwice)
    (name,) = graph.groups
    gradients = torch.stack(
        [
            gradient_at_one(loss_behind(model, [("first", 0), ("again", 0)], minibatch(1, slice(image, image + 1))), 4)
            for image in range(8)
        ]
    )
    assert_scores(fg(model, graph), {name: gradients.square().mean(0)})


class ActiveNorm(nn.BatchNorm2d):
    """A normalisation with its activation inside, as timm's networks have it (`timm.layers.BatchNormAct2d`)."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class ActiveNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3), ActiveNorm(5, nn.ReLU(inplace=True))
        self.second, self.second_norm = nn.Conv2d(5, 4, 3), ActiveNorm(4, nn.Hardswish(inplace=True))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second_norm(self.second(self.norm(self.first(x)))).mean((2, 3)))


def test_taylor_fg_gates_a_normalisation_with_an_activation_inside_before_the_activation() -> None:
    model, graph = prepared(ActiveNorms)
    single = minibatch(1, slice(0, 1))
    single.loss(model(*single.inputs)).backward()
    taylor = build("taylor", model, graph)
    taylor.observe()
    importance = build("taylor-fg", model, graph)
    single.loss(model(*single.inputs)).backward()
    importance.observe()
    importance.close()
    assert_scores(importance.scores(), taylor.scores())


def test_close_removes_every_hook() -> None:
    model, graph = prepared(Residual)
    importance = build("taylor-fg", model, graph)
    count = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert count == 4  # the model and three gates
    importance.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_missing_backward_is_an_error() -> None:
    model, graph = prepared(Residual)
    importance = build("taylor-fg", model, graph)
    with pytest.raises(WorkError, match=r"taylor-fg saw no forward and backward pass.*pruner\.step\(\)"):
        importance.observe()
    model(batch(1)[0])
    with pytest.raises(WorkError, match="saw no forward and backward pass"):
        importance.observe()
    backward(model, 1)
    importance.observe()
    with pytest.raises(WorkError, match="saw no forward and backward pass"):
        importance.observe()
