"""First-order Taylor importance against explicit gates, and by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph, trace
from compress.importance import Taylor, build, criteria


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.outer, self.outer_norm = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.inner_norm(self.inner(x)))
        return self.head(F.relu(x + self.outer_norm(self.outer(y))).mean((2, 3)))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.left_norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.right = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(7)
        self.last = nn.Conv2d(7, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        joined = torch.cat([self.left_norm(self.left(x)).relu(), self.right(x).relu()], 1)
        return self.head(self.last(self.norm(joined).relu()).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depth, self.depth_norm = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.project = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu6(self.expand_norm(self.expand(x)))
        x = F.relu6(self.depth_norm(self.depth(x)))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(self.project(x).mean((2, 3)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3)
        self.hidden, self.head = nn.Linear(4 * 16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


# Where an explicit gate has to stand for the channel to vanish, worked out by hand: group -> gated modules.
GATES = {
    Residual: {"stem": ["stem_norm", "outer_norm"], "inner": ["inner_norm"]},
    Concatenation: {"left": ["norm"], "right": ["norm"], "last": ["last"]},
    Depthwise: {"expand": ["depth_norm"], "squeeze": ["squeeze"], "project": ["project"]},
    Plain: {"first": ["first"], "second": ["second"], "hidden": ["hidden"]},
}
OFFSET = {("right", "norm"): 4}  # where the group's channels begin in a module that holds several groups


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 8, 8, generator=generator, dtype=torch.double), torch.arange(8) % 3


def gate_gradient(model: nn.Module, group: str, modules: list[str], width: int, seed: int) -> torch.Tensor:
    gate = torch.ones(width, dtype=torch.double, requires_grad=True)

    def gated(start: int):
        def multiply(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
            ones = torch.ones(output.shape[1], dtype=torch.double)
            factor = torch.cat([ones[:start], gate, ones[start + width :]])
            return output * factor.view(1, -1, *[1] * (output.dim() - 2))

        return multiply

    hooks = [model.get_submodule(name).register_forward_hook(gated(OFFSET.get((group, name), 0))) for name in modules]
    images, labels = batch(seed)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), gate)
    for hook in hooks:
        hook.remove()
    return gradient


def backward(model: nn.Module, seed: int) -> None:
    images, labels = batch(seed)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


@pytest.mark.parametrize("net", GATES, ids=lambda net: net.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_score_is_the_squared_gradient_of_an_explicit_gate(net: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model = net().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train(training)
    graph = trace(model, batch(0)[0])
    assert set(graph.groups) == set(GATES[net])
    importance = Taylor(model, graph)
    for seed in (1, 2):
        backward(model, seed)
        importance.observe()
    scores = importance.scores()
    for name, modules in GATES[net].items():
        width = graph.groups[name].width
        expected = sum(gate_gradient(model, name, modules, width, seed).square() for seed in (1, 2)) / 2
        torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=1e-14)


def linear_chain() -> tuple[nn.Sequential, ChannelGraph]:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [3.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    return model, trace(model, torch.ones(1, 1))


def set_gradients(model: nn.Sequential, weight: tuple[float, float], bias: tuple[float, float]) -> None:
    model[0].weight.grad = torch.tensor(weight).view(2, 1)
    model[0].bias.grad = torch.tensor(bias)


def test_squares_are_averaged_over_minibatches_and_events() -> None:
    model, graph = linear_chain()
    importance = Taylor(model, graph, momentum=0.9)
    set_gradients(model, (1.0, 1.0), (2.0, 5.0))  # gates: 2·1 + 1·2 = 4 and 3·1 + 0·5 = 3
    importance.observe()
    set_gradients(model, (-1.0, 1.0), (0.0, 0.0))  # gates: −2 and 3; the mean of the gradients would be 1 and 3
    importance.observe()
    assert importance.scores()["0"].tolist() == [10.0, 9.0]
    set_gradients(model, (0.0, 0.0), (0.0, 0.0))
    importance.observe()
    torch.testing.assert_close(importance.scores()["0"], torch.tensor([9.0, 8.1], dtype=torch.double))


def test_averages_of_removed_channels_go() -> None:
    model, graph = linear_chain()
    importance = Taylor(model, graph, momentum=0.5)
    set_gradients(model, (1.0, 1.0), (2.0, 5.0))
    importance.observe()
    importance.scores()
    graph.remove({"0": torch.tensor([0])})
    importance.removed({"0": torch.tensor([0])}, {"0": 2})
    model[0].weight.data, model[0].bias.data = torch.tensor([[3.0]]), torch.tensor([0.0])
    model[0].weight.grad, model[0].bias.grad = torch.tensor([[1.0]]), torch.tensor([0.0])
    importance.observe()
    assert importance.scores()["0"].tolist() == [9.0]


def test_state_survives() -> None:
    model, graph = linear_chain()
    first = Taylor(model, graph)
    set_gradients(model, (1.0, 1.0), (2.0, 5.0))
    first.observe()
    second = Taylor(model, graph)
    second.load_state_dict(first.state_dict())
    assert second.scores()["0"].tolist() == first.scores()["0"].tolist()


def test_scores_that_are_not_finite_name_the_layer() -> None:
    model, graph = linear_chain()
    importance = Taylor(model, graph)
    set_gradients(model, (float("nan"), 1.0), (0.0, 0.0))
    importance.observe()
    with pytest.raises(WorkError, match="importance of 1 channels of 0 is NaN or infinite"):
        importance.scores()


def test_missing_gradient_names_the_parameter() -> None:
    model, graph = linear_chain()
    with pytest.raises(WorkError, match=r"0\.weight has no gradient.*ignore"):
        Taylor(model, graph).observe()


def test_nothing_observed() -> None:
    model, graph = linear_chain()
    with pytest.raises(WorkError, match="No minibatch"):
        Taylor(model, graph).scores()


def test_registry() -> None:
    model, graph = linear_chain()
    assert "taylor" in criteria()
    assert isinstance(build("taylor", model, graph), Taylor)
    with pytest.raises(InputError, match="did you mean 'taylor'"):
        build("tailor", model, graph)
    with pytest.raises(InputError, match="momentum is 1"):
        build("taylor", model, graph, momentum=1.0)
