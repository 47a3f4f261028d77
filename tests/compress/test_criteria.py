"""Every criterion against a slow and obvious reference: explicit gates, loops over images, whole Hessians, by hand."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import Spec, specs
from random_nets import build as random_net
from random_nets import inputs as random_images
from test_importance import GATES, OFFSET, Concatenation, Depthwise, Plain, Residual, backward, batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph, trace
from compress.importance import Importance, Minibatch, build, criteria, criterion, second_order
from compress.modes import aside
from compress.removal import keep_slices

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


# --- first order ----------------------------------------------------------------------------------------------------


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


# --- activations ----------------------------------------------------------------------------------------------------


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


class UsedTwice(nn.Module):
    """One layer that runs twice, the second time on what it made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.again(self.again(x).relu()).relu().mean((2, 3)))


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


# --- second order ---------------------------------------------------------------------------------------------------


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


class Sigmoid(nn.Module):
    """Between `first` and `second` a channel whose gate is 0 is read as one half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.second, self.head = nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).sigmoid()).relu().mean((2, 3)))


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


# --- weights alone --------------------------------------------------------------------------------------------------


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
    keep_slices(model, graph.remove(removals))
    importance.removed(removals, widths)
    importance.observe()
    after = importance.scores()
    assert_scores(
        after, {"first": before["first"][[0, 2, 3]], "second": before["second"], "hidden": before["hidden"][1:]}
    )


# --- the oracle -----------------------------------------------------------------------------------------------------

SIGMOIDS = Spec(8, (("squeeze-excite", 4), ("sigmoid", 8), ("residual", 4), ("unit", 4)), "mean", seed=2)


def changes_by_removal(model: nn.Module, graph: ChannelGraph, one: Minibatch) -> dict[str, Tensor]:
    """Every channel alone removed for real from a copy."""
    found = {}
    with torch.no_grad():
        whole = one.loss(model(*one.inputs))
        for name, width in graph.widths.items():
            found[name] = torch.zeros(width, dtype=torch.double)
            for channel in range(width):
                pruned = copy.deepcopy(model)
                keep_slices(pruned, graph.copy().remove({name: torch.tensor([channel])}))
                found[name][channel] = one.loss(pruned(*one.inputs)) - whole
    return found


def sigmoids() -> tuple[nn.Module, ChannelGraph, list[Minibatch]]:
    model = random_net(SIGMOIDS)
    graph = trace(model, random_images())
    assert any(group.residue is not None for group in graph.groups.values())
    labels = torch.arange(4) % 5
    batches = [Minibatch((random_images(4, seed),), lambda output: F.cross_entropy(output, labels)) for seed in (1, 2)]
    return model, graph, batches


@pytest.mark.parametrize("net", [*NETS, Sigmoid, SIGMOIDS], ids=lambda net: getattr(net, "__name__", "Sigmoids"))
def test_oracle_is_the_change_of_loss_when_the_channel_is_removed_for_real(net: object) -> None:
    if isinstance(net, Spec):
        model, graph, batches = sigmoids()
    else:
        model, graph = prepared(net)
        batches = [minibatch(1), minibatch(2)]
    changes = [changes_by_removal(model, graph, one) for one in batches]
    reductions = {"squared": torch.square, "absolute": torch.abs, "signed": lambda values: values}
    for reduction, function in reductions.items():
        if reduction != "squared" and net is not Sigmoid:
            continue
        importance = build(f"oracle:reduction={reduction}", model, graph)
        for one in batches:
            importance.observe(one)
        expected = {name: sum(function(change[name]) for change in changes) / 2 for name in graph.groups}
        scores = importance.scores()
        for name in graph.groups:
            torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=1e-14)
        assert importance.signed == (reduction == "signed")


# --- options and registry -------------------------------------------------------------------------------------------

NEEDS = {
    "bn-scale": set(),
    "bn-taylor": {"gradients"},
    "hessian": {"minibatch"},
    "magnitude": set(),
    "obd": {"minibatch"},
    "oracle": {"minibatch"},
    "random": set(),
    "taylor": {"gradients"},
    "taylor-fg": {"activations"},
    "taylor-logits": {"minibatch"},
    "taylor-output": {"activations"},
    "taylor-so": {"minibatch"},
    "taylor-so-full": {"minibatch"},
    "taylor-weight": {"gradients"},
}


def test_needs_of_every_criterion() -> None:
    assert criteria() == sorted(NEEDS)
    for name, needs in NEEDS.items():
        kind, options = criterion(name)
        assert (kind.name, set(kind.needs), options) == (name, needs, {})


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if "minibatch" in needs])
def test_a_criterion_that_runs_the_network_asks_for_the_minibatch(name: str) -> None:
    model, graph = prepared(Residual)
    with pytest.raises(WorkError, match=f"The criterion {name} runs the network by itself: give pruner.step"):
        build(name, model, graph).observe()


def test_options_have_the_types_of_their_defaults() -> None:
    assert criterion("taylor:combine=mean:momentum=0:normalise=true")[1] == {
        "combine": "mean",
        "momentum": 0.0,
        "normalise": True,
    }
    assert criterion("hessian:samples=4:seed=7:estimator=hutchinson:normalise=false")[1] == {
        "samples": 4,
        "seed": 7,
        "estimator": "hutchinson",
        "normalise": False,
    }
    model, graph = prepared(Residual)
    importance = build("taylor:combine=mean:momentum=0", model, graph, momentum=0.5, normalise=True)
    assert (importance.combine, importance.momentum, importance.normalise) == ("mean", 0.0, True)  # the text goes first
    assert build("taylor-output", model, graph).normalise
    assert not build("taylor-output:normalise=false", model, graph).normalise


SENTENCES = {
    "tailor": r"importance is 'tailor', which is no criterion: did you mean 'taylor'\?",
    "hesian": r"did you mean 'hessian'\?",
    "xyz": r"importance is 'xyz', which is no criterion: choose one of bn-scale, bn-taylor, .*taylor-weight\.",
    "taylor:speed=1": r"taylor has no option 'speed': it has momentum, combine, normalise\.",
    "magnitude:samples=1": r"magnitude has no option 'samples': it has momentum, combine, normalise, norm\.",
    "taylor:": r"taylor has no option '': it has",
    "taylor:momentum=x": r"'momentum=x' is no value for the option momentum of taylor: write taylor:momentum=0\.9\.",
    "hessian:samples=1.5": r"'samples=1\.5' is no value for the option samples of hessian: write hessian:samples=1\.",
    "taylor:combine": r"The option combine of taylor has no value: write taylor:combine=joint\.",
    "taylor:momentum": r"The option momentum of taylor has no value: write taylor:momentum=0\.9\.",
    "taylor:normalise": r"The option normalise of taylor has no value: write taylor:normalise=false\.",
    "taylor:normalise=1": r"'normalise=1' is no value for the option normalise of taylor: write taylor:normalise=false",
    "taylor:momentum=1": r"momentum is 1\.0, but must lie in \[0, 1\)\.",
    "taylor:momentum=-0.1": r"momentum is -0\.1, but must lie in \[0, 1\)\.",
    "taylor:momentum=nan": r"momentum is nan, but must lie in \[0, 1\)\.",
    "taylor:combine=sum": r"combine is 'sum', but must be one of joint, mean, max, shared-gate\.",
    "magnitude:combine=shared-gate": r"'shared-gate', which magnitude does not offer: choose one of joint, mean, max\.",
    "oracle:combine=mean": r"combine is 'mean', which oracle does not offer: choose one of joint\.",
    "magnitude:norm=l3": r"norm is 'l3', but must be l1 or l2\.",
    "hessian:estimator=exact": r"estimator is 'exact', but must be fisher or hutchinson\.",
    "hessian:samples=0": r"samples is 0, but must be at least 1\.",
    "oracle:reduction=mean": r"reduction is 'mean', but must be one of squared, absolute, signed\.",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_a_wrong_option_is_one_sentence(text: str) -> None:
    model, graph = prepared(Residual)
    with pytest.raises(InputError, match=SENTENCES[text]):
        build(text, model, graph)


def test_what_a_sentence_says_to_write_is_accepted() -> None:
    model, graph = prepared(Residual)
    for text in (
        "taylor:normalise=yes",
        "taylor:momentum=high",
        "taylor:combine",
        "hessian:samples=x",
        "hessian:seed=",
    ):
        with pytest.raises(InputError) as caught:
            build(text, model, graph)
        advice = str(caught.value).rpartition("write ")[2].removesuffix(".")
        build(advice, model, graph)


@pytest.mark.parametrize("name", ["magnitude", "taylor", "taylor-fg", "taylor-output", "hessian", "oracle"])
def test_normalise_divides_each_group_by_its_norm(name: str) -> None:
    model, graph = prepared(Residual)
    plain = scores_of(name, model, graph, normalise=False)
    expected = {group: values / values.square().sum().sqrt() for group, values in plain.items()}
    assert_scores(scores_of(name, model, graph, normalise=True), expected)


def test_normalise_leaves_a_group_of_zeros() -> None:
    model, graph = prepared(Residual)
    nn.init.zeros_(model.inner.weight)
    assert scores_of("magnitude:normalise=true", model, graph)["inner"].tolist() == [0.0] * 5


@pytest.mark.parametrize("name", ["taylor", "taylor-fg", "oracle", "hessian:estimator=hutchinson"])
def test_scores_are_averaged_over_minibatches_and_events(name: str) -> None:
    model, graph = prepared(Residual)

    def one_of(seed: int) -> dict[str, Tensor]:
        return observed(build(f"{name}:momentum=0", model, graph), (seed,))

    def observed(importance: Importance, seeds: tuple[int, ...]) -> dict[str, Tensor]:
        for seed in seeds:
            backward(model, seed)
            importance.observe(minibatch(seed))
        return importance.scores()

    if name.startswith("hessian"):  # draws anew for every minibatch
        importance = build(f"{name}:momentum=0", model, graph)
        singles = {seed: observed(importance, (seed,)) for seed in (1, 2, 3)}
    else:
        singles = {seed: one_of(seed) for seed in (1, 2, 3)}
    importance = build(f"{name}:momentum=0.25", model, graph)
    first = observed(importance, (1, 2))
    means = {group: (singles[1][group] + singles[2][group]) / 2 for group in graph.groups}
    assert_scores(first, means)
    second = observed(importance, (3,))
    assert_scores(second, {group: means[group] / 4 + singles[3][group] * 3 / 4 for group in graph.groups})
    importance.close()


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if not needs and name != "random"])
def test_a_criterion_that_needs_nothing_is_not_averaged(name: str) -> None:
    model, graph = prepared(Residual)
    importance = build(name, model, graph, momentum=0.9)
    importance.observe()
    importance.scores()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    importance.observe()
    importance.observe()
    assert_scores(importance.scores(), scores_of(name, model, graph))
    with pytest.raises(WorkError, match="No minibatch was observed"):
        importance.scores()


@pytest.mark.parametrize("name", sorted(set(NEEDS) - {"random", "taylor-so"}))
def test_scores_after_a_removal_are_those_of_the_smaller_network(name: str) -> None:
    model, graph = prepared(Residual)
    importance = build(name, model, graph, momentum=0.0)
    backward(model, 1)
    importance.observe(minibatch())
    importance.scores()
    removals, widths = {"stem": torch.tensor([0, 3]), "inner": torch.tensor([4])}, graph.widths
    keep_slices(model, graph.remove(removals))
    importance.removed(removals, widths)
    with pytest.raises(WorkError, match="No minibatch was observed"):
        importance.scores()
    backward(model, 1)
    importance.observe(minibatch())
    importance.close()
    fresh = trace(model, batch(0)[0])
    assert_scores(importance.scores(), scores_of(name, model, fresh))


def test_averages_of_removed_channels_go_and_those_of_the_others_stay() -> None:
    model, graph = prepared(Residual)
    importance = build("oracle:momentum=0.5", model, graph)
    importance.observe(minibatch())
    before = importance.scores()
    removals, widths = {"stem": torch.tensor([0, 3])}, graph.widths
    keep_slices(model, graph.remove(removals))
    importance.removed(removals, widths)
    importance.observe(minibatch())
    now = scores_of("oracle", model, graph)
    stem = (before["stem"][[1, 2, 4, 5]] + now["stem"]) / 2
    assert_scores(importance.scores(), {"stem": stem, "inner": (before["inner"] + now["inner"]) / 2})


# --- a criterion that cannot score a model says so ------------------------------------------------------------------

CANNOT = [
    ("bn-scale", Plain, r"bn-scale cannot score 3 of 3 channel groups \(first: .* follows first; second: .*hidden"),
    ("bn-taylor", Plain, r"bn-taylor cannot score 3 of 3 channel groups \(first: .* follows first; second: .*hidden"),
    (
        "bn-scale",
        Concatenation,
        r"bn-scale cannot score 1 of 3 channel groups \(last: no norm.* follows last\): choose",
    ),
    ("taylor-fg", "layer-scale", r"taylor-fg cannot score 1 of 2 .*\(0\.0\.0: the channels of 1 are not"),
    ("taylor-output", "layer-scale", r"taylor-output cannot score 1 of 2 .*\(0\.0\.0: the channels of 1 are"),
    ("hessian", "own", r"hessian cannot score 1 of 2 channel groups \(own: own is no convolution or linear layer\)"),
    ("taylor-fg", "own", r"taylor-fg cannot score 1 of 2 channel groups \(own: the channels of own are not those of a"),
]


class OwnLinear(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 8), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.hidden, self.head = OwnLinear(2 * 8 * 8, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.own(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize(("name", "net", "sentence"), CANNOT)
def test_a_criterion_that_cannot_score_a_model_names_the_layers(name: str, net: object, sentence: str) -> None:
    if net == "layer-scale":
        model = random_net(Spec(8, (("layer-scale", 4),), "mean", seed=0))
        graph = trace(model, random_images())
    else:
        model, graph = prepared(OwnLayers if net == "own" else net)
    with pytest.raises(InputError, match=sentence + r".*ignore\.$" if "choose" not in sentence else sentence):
        build(name, model, graph)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- what must always hold ------------------------------------------------------------------------------------------

few = settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = ("chain", "plain", "residual", "projection", "dense", "branches", "depthwise", "squeeze-excite", "sigmoid")


def of_random_net(spec: Spec) -> tuple[nn.Module, ChannelGraph, Callable[[list[int]], Minibatch]]:
    model = random_net(spec)
    graph = trace(model, random_images())
    images, labels = random_images(6, 1), torch.tensor([0, 1, 2, 3, 4, 0])

    def of(order: list[int]) -> Minibatch:
        return Minibatch((images[order],), lambda output: F.cross_entropy(output, labels[order]))

    return model, graph, of


def after_one(text: str, model: nn.Module, graph: ChannelGraph, one: Minibatch) -> dict[str, Tensor]:
    importance = build(text, model, graph)
    model.zero_grad()
    one.loss(model(*one.inputs)).backward()
    importance.observe(one)
    importance.close()
    return importance.scores()


def applicable(names: list[str], model: nn.Module, graph: ChannelGraph) -> list[str]:
    found = []
    for name in names:
        try:
            build(name, model, graph).close()
        except InputError:
            continue
        found.append(name)
    return found


@few
@given(spec=specs(KINDS, max_blocks=2), order=st.permutations(range(6)))
def test_scores_are_finite_unsigned_and_do_not_depend_on_the_order_of_the_images(spec: Spec, order: list[int]) -> None:
    model, graph, of = of_random_net(spec)
    cheap = [name for name in NEEDS if name not in ("oracle", "taylor-so", "obd")]
    names = applicable(cheap, model, graph)
    assert {"taylor", "magnitude", "random", "taylor-so-full", "hessian"} <= set(names)
    for name in names:
        scores = after_one(name, model, graph, of(list(range(6))))
        permuted = after_one(name, model, graph, of(order))
        for group, values in scores.items():
            assert bool(torch.isfinite(values).all())
            assert bool((values >= 0).all())
            torch.testing.assert_close(permuted[group], values, rtol=1e-8, atol=1e-18)


@settings(few, max_examples=2)
@given(spec=specs(KINDS, max_blocks=1), order=st.permutations(range(6)))
def test_ablations_and_curvatures_do_not_depend_on_the_order_of_the_images(spec: Spec, order: list[int]) -> None:
    model, graph, of = of_random_net(spec)
    for name in ("oracle", "obd"):
        importance = build(f"{name}:momentum=0", model, graph)
        importance.observe(of(list(range(6))))
        scores = importance.scores()
        importance.observe(of(order))
        permuted = importance.scores()
        for group, values in scores.items():
            assert bool(torch.isfinite(values).all())
            assert name == "obd" or bool((values >= 0).all())
            torch.testing.assert_close(permuted[group], values, rtol=1e-6, atol=1e-14)


@few
@given(spec=specs(tuple(kind for kind in KINDS if kind != "plain"), max_blocks=2), training=st.booleans())
def test_of_a_single_image_taylor_and_taylor_fg_are_the_same(spec: Spec, training: bool) -> None:
    model, graph, of = of_random_net(spec)
    model.train(training and spec.head != "two-layers")  # that one draws dropout anew for each criterion
    single = of([3])
    for combine in ("joint", "mean", "max"):
        names = [f"taylor:combine={combine}", f"taylor-fg:combine={combine}"]
        scores, full = (after_one(name, model, graph, single) for name in names)
        for group, values in scores.items():
            torch.testing.assert_close(full[group], values, rtol=1e-8, atol=1e-18)


@settings(few, max_examples=4)
@given(spec=specs(tuple(kind for kind in KINDS if kind != "sigmoid"), max_blocks=2), seed=st.integers(0, 2**16))
def test_a_channel_whose_gates_are_0_has_no_importance(spec: Spec, seed: int) -> None:
    model, graph, of = of_random_net(spec)
    generator = torch.Generator().manual_seed(seed)
    closed = {name: int(torch.randint(width, (), generator=generator)) for name, width in graph.widths.items()}
    parameters = dict(model.named_parameters())
    for name, channel in closed.items():
        for slot, positions in graph.groups[name].positions(torch.tensor([channel])).items():
            if slot in graph.groups[name].gates:
                parameters[slot[0]].data.index_fill_(slot[1], positions, 0)
    for name in applicable(["taylor", "taylor:combine=max", "taylor-fg", "taylor-output", "oracle"], model, graph):
        scores = after_one(name, model, graph, of(list(range(6))))
        for group, channel in closed.items():
            assert float(scores[group][channel]) < 1e-24, (name, group)


@few
@given(spec=specs(KINDS, max_blocks=2))
def test_all_rules_agree_in_a_group_with_one_gate(spec: Spec) -> None:
    model, graph, of = of_random_net(spec)
    one = of(list(range(6)))
    for name in applicable(["taylor", "taylor-fg", "taylor-output:normalise=false"], model, graph):
        joint, mean, largest = (
            after_one(f"{name}:combine={how}", model, graph, one) for how in ("joint", "mean", "max")
        )
        for group in graph.groups.values():
            if len({slot[0].rpartition(".")[0] for slot in group.gates}) == 1:
                torch.testing.assert_close(mean[group.name], joint[group.name], **CLOSE)
                torch.testing.assert_close(largest[group.name], joint[group.name], **CLOSE)
    for name in ("magnitude", "taylor-weight", "hessian"):
        joint, mean, largest = (
            after_one(f"{name}:combine={how}", model, graph, one) for how in ("joint", "mean", "max")
        )
        for group in graph.groups.values():
            if len(group.filters) == 1:
                torch.testing.assert_close(mean[group.name], joint[group.name], **CLOSE)
                torch.testing.assert_close(largest[group.name], joint[group.name], **CLOSE)
