"""Slow and obvious references that the criteria are held against: explicit gates, sums over filters by hand."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from test_importance import GATES, OFFSET, Concatenation, Depthwise, Plain, Residual, backward, batch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, build

CLOSE = {"rtol": 1e-6, "atol": 1e-16}

NETS = list(GATES)

each_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)

# The layers whose filters make the channels, worked out by hand.
FILTERS = {
    Residual: {"stem": ["stem", "outer"], "inner": ["inner"]},
    Concatenation: {"left": ["left"], "right": ["right"], "last": ["last"]},
    Depthwise: {"expand": ["expand", "depth", "excite"], "squeeze": ["squeeze"], "project": ["project"]},
    Plain: {"first": ["first"], "second": ["second"], "hidden": ["hidden"]},
}


def prepared(net: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelGraph]:
    model, graph = _prepared(net)
    return copy.deepcopy(model), graph.copy()


@cache
def _prepared(net: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = net().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.eval()
    return model, trace(model, batch(0)[0])


def minibatch(seed: int = 1, images: slice = slice(None)) -> Minibatch:
    pictures, labels = batch(seed)
    return Minibatch((pictures[images],), lambda output: F.cross_entropy(output, labels[images]))


@contextmanager
def gated(model: nn.Module, gates: Mapping[tuple[str, int], Tensor]) -> Iterator[None]:
    """Multiply outputs: (module, where the channels begin) -> (channels,) or (images, channels) factors."""

    def multiply(start: int, gate: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
            gate_of_each = gate.expand(len(output), -1)
            before = torch.ones(len(output), start, dtype=output.dtype)
            after = torch.ones(len(output), output.shape[1] - start - gate_of_each.shape[1], dtype=output.dtype)
            factor = torch.cat([before, gate_of_each, after], 1)
            return output * factor.view(*factor.shape, *[1] * (output.dim() - 2))

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(multiply(start, gate)) for (name, start), gate in gates.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def places(net: type[nn.Module], group: str) -> list[tuple[str, int]]:
    return [(module, OFFSET.get((group, module), 0)) for module in GATES[net][group]]


def loss_behind(
    model: nn.Module, where: list[tuple[str, int]], batch_: Minibatch | None = None
) -> Callable[[Tensor], Tensor]:
    """Gate factors -> loss, with the same gate at all of these places."""
    one = batch_ or minibatch()

    def loss(gate: Tensor) -> Tensor:
        with gated(model, dict.fromkeys(where, gate)):
            return one.loss(model(*one.inputs))

    return loss


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.double, requires_grad=True)


def gradient_at_one(loss: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    gate = ones(*shape)
    return torch.autograd.grad(loss(gate), gate)[0]


def weight_gradients(model: nn.Module, batch_: Minibatch) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(batch_.loss(model(*batch_.inputs)), parameters)
    return dict(zip(names, gradients, strict=True))


def scores_of(text: str, model: nn.Module, graph: ChannelGraph, **options: object) -> dict[str, Tensor]:
    """Scores after one minibatch, whatever the criterion needs."""
    importance = build(text, model, graph, **options)
    backward(model, 1)
    importance.observe(minibatch())
    importance.close()
    return importance.scores()


def assert_scores(scores: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(scores) == list(expected)
    for name, values in scores.items():
        assert values.dtype == torch.float64
        torch.testing.assert_close(
            values, expected[name].double(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def by_filters(
    model: nn.Module, net: type[nn.Module], function: Callable[[str, Tensor], Tensor], combine: str = "joint"
) -> dict[str, Tensor]:
    """Group -> the sum of `function` over each filter, of all the layers that make the channel."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    combined = {}
    for group, layers in FILTERS[net].items():
        rows = []
        for layer in layers:
            values = function(f"{layer}.weight", parameters[f"{layer}.weight"])
            rows.append([sum(values[channel].flatten().tolist()) for channel in range(len(values))])
        stacked = torch.tensor(rows, dtype=torch.double)
        combined[group] = {"joint": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[combine]
    return combined


class UsedTwice(nn.Module):
    """One layer that runs twice, the second time on what it made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.again(self.again(x).relu()).relu().mean((2, 3)))


class Sigmoid(nn.Module):
    """Between `first` and `second` a channel whose gate is 0 is read as one half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.second, self.head = nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).sigmoid()).relu().mean((2, 3)))
