"""Layers that users describe themselves: what they bind, and what a description may not say."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_graph_rules import IMAGE, Net, each, positions, reasons
from test_removal_equals_zeroing import relative_error, zeroed
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import cost_model
from compress.errors import InputError
from compress.graph import ChannelGraph, custom_layer, trace
from compress.graph.custom import CUSTOM_LAYERS
from compress.graph.part import trace_part
from compress.removal import shape_update


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(CUSTOM_LAYERS)
    yield
    CUSTOM_LAYERS.clear()
    CUSTOM_LAYERS.update(before)


@torch.library.custom_op("espalier_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator without a rule."""
    return x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mixed(nn.Module):
    """A 1x1 convolution with an offset for every pixel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        scale = opaque(offset).tanh().mean(1, keepdim=True)
        return functional.conv2d(opaque(x) * scale, self.weight[..., None, None]) + self.bias.view(-1, 1, 1)


def mixed(layer: Any, x: Any, offset: Any) -> Any:
    layer.reads(x, "weight", dim=1)
    layer.keeps(offset)
    return layer.makes("weight", "bias")


class Offsets(Net):
    """`a`, an offset from `o`, the custom layer `m`, the head `z`."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__(4, head=5)
        self.o, self.m = nn.Conv2d(3, 2, 1), layer or Mixed(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.m(self.a(x), self.o(x)).mean((2, 3)))


def equal_after(model: nn.Module, graph: ChannelGraph, example: Tensor, share: float = 0.5) -> None:
    """Removing a share of every group is what zeroing it is, and the removal took place."""
    model = copy.deepcopy(model).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    images = torch.randn((2, *example.shape[1:]), dtype=torch.float64)
    removals = {name: torch.randperm(width)[: int(width * share)] for name, width in graph.widths.items()}
    expected = zeroed(model, graph, removals)(images)
    before = sum(parameter.numel() for parameter in model.parameters())
    graph.copy().remove_from(model, removals)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert relative_error(model(images), expected) < 1e-9


def test_without_a_description_it_freezes() -> None:
    graph = trace(Offsets(), IMAGE)
    assert graph.operators_without_rule
    assert reasons(graph)["a"] == "operator espalier_test.opaque.default has no rule"


def test_reads_keeps_and_makes() -> None:
    custom_layer(Mixed)(mixed)
    model = Offsets()
    graph = trace(model, IMAGE)
    assert positions(graph, "a") == {
        ("a.weight", 0): each(0, 1, 2, 3),
        ("a.bias", 0): each(0, 1, 2, 3),
        ("m.weight", 1): each(0, 1, 2, 3),
    }
    assert positions(graph, "m") == {
        ("m.weight", 0): each(0, 1, 2, 3, 4),
        ("m.bias", 0): each(0, 1, 2, 3, 4),
        ("z.weight", 1): each(0, 1, 2, 3, 4),
    }
    assert graph.groups["a"].consumers == ("m",)
    assert graph.groups["m"].gate_slots == (("m.weight", 0), ("m.bias", 0))
    assert graph.groups["m"].exact
    assert reasons(graph)["o"] == "kept by the custom layer m"
    assert not graph.operators_without_rule
    equal_after(model, graph, IMAGE)


def test_what_is_not_mentioned_stays() -> None:
    @custom_layer(Mixed)
    def forgetful(layer: Any, x: Any, offset: Any) -> Any:
        return layer.makes("weight", "bias")

    graph = trace(Offsets(), IMAGE)
    assert list(graph.groups) == ["m"]
    expected = "not mentioned in the description of the custom layer m"
    assert reasons(graph)["a"] == reasons(graph)["o"] == expected


def test_a_subclass_and_a_qualified_name() -> None:
    class Special(Mixed):
        pass

    custom_layer(f"{Mixed.__module__}.{Mixed.__qualname__}")(mixed)
    assert list(trace(Offsets(Special(4, 5)), IMAGE).groups) == ["a", "m"]


class Scaled(nn.Module):
    """x * gain + shift, or another function of the channel."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(1, width, 1, 1)), nn.Parameter(torch.randn(width))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(opaque(x), self.gain, self.shift.view(-1, 1, 1))


class Middle(Net):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(4)
        self.m = layer

    def middle(self, x: Tensor) -> Tensor:
        return self.m(x)


def test_a_scale_is_the_gate() -> None:
    @custom_layer(Scaled)
    def scaled(layer: Any, x: Any) -> Any:
        return layer.scales(x, ("gain", 1), "shift")

    model = Middle(Scaled(lambda x, gain, shift: x * gain + shift))
    graph = trace(model, IMAGE)
    assert positions(graph, "a") == {
        ("a.weight", 0): each(0, 1, 2, 3),
        ("a.bias", 0): each(0, 1, 2, 3),
        ("m.gain", 1): each(0, 1, 2, 3),
        ("m.shift", 0): each(0, 1, 2, 3),
        ("z.weight", 1): each(0, 1, 2, 3),
    }
    assert graph.groups["a"].gate_slots == (("m.gain", 1), ("m.shift", 0))
    assert graph.groups["a"].producers[0].norms == ("m",)
    equal_after(model, graph, IMAGE)


@pytest.mark.parametrize("keeps_zero", [True, False])
def test_slopes_are_no_gate(keeps_zero: bool) -> None:
    @custom_layer(Scaled)
    def passed(layer: Any, x: Any) -> Any:
        return layer.passes(x, ("gain", 1), "shift", keeps_zero=keeps_zero)

    slope = lambda x, gain, shift: torch.where(x > 0, x * gain, x * shift)  # noqa: E731
    model = Middle(Scaled(slope if keeps_zero else lambda x, gain, shift: (x * gain).sigmoid() * shift))
    graph = trace(model, IMAGE)
    assert graph.groups["a"].gate_slots == (("a.weight", 0), ("a.bias", 0))
    assert graph.groups["a"].residue == (None if keeps_zero else "z")
    equal_after(model, graph, IMAGE)


def test_a_depthwise_filter_makes_the_channels_that_it_reads() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(opaque(x), self.weight, self.bias, groups=len(self.weight))

    @custom_layer(Depthwise)
    def depthwise(layer: Any, x: Any) -> Any:
        return layer.scales(x, "weight", "bias")

    model = Middle(Depthwise())
    graph = trace(model, IMAGE)
    assert [producer.layer for producer in graph.groups["a"].producers] == ["a", "m"]
    assert graph.groups["a"].gate_slots == (("m.weight", 0), ("m.bias", 0))
    equal_after(model, graph, IMAGE)
    assert graph.uses["m.weight"] == 2 * 2


class Mlp(nn.Module):
    """Tokens: a norm over channels, two layers with a sigmoid between, the sum with what came in."""

    def __init__(self, width: int = 4, hidden: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, *, also: bool = False) -> Any:
        y = x + self.down(opaque(self.up(self.norm(x))).sigmoid())
        return (y, None) if also else y


def mlp(layer: Any, x: Any, *, also: bool = False) -> Any:
    layer.mixes(x, axis=-1)
    normed = layer.scales(x, "norm.weight", "norm.bias", axis=-1)
    layer.reads(normed, "up.weight")
    hidden = layer.passes(layer.makes("up.weight", "up.bias"))
    layer.reads(hidden, "down.weight")
    y = layer.adds(x, layer.makes("down.weight", "down.bias"), axis=-1)
    return (y, None) if also else y


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mlp, self.head = nn.Linear(3, 4), Mlp(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.mlp(self.stem(x), also=True)
        return self.head(self.mlp(y))  # a second time


TOKENS = torch.zeros(1, 5, 3)


def test_modules_inside_and_a_second_use() -> None:
    custom_layer(Mlp)(mlp)
    model = Tokens()
    graph = trace(model, TOKENS)
    assert list(graph.groups) == ["mlp.up"]
    assert "mlp mixes channels" in reasons(graph)["stem"]
    assert positions(graph, "mlp.up")["mlp.down.weight", 1] == each(*range(6))
    assert graph.groups["mlp.up"].residue == "mlp.down"
    assert graph.uses["mlp.up.weight"] == 2 * 5
    equal_after(model, graph, TOKENS)
    streams = trace(model, TOKENS, embedding=True)
    assert positions(streams, "stem") == {
        **{(f"{name}.weight", 0): each(0, 1, 2, 3) for name in ("stem", "mlp.norm", "mlp.down")},
        **{(f"{name}.bias", 0): each(0, 1, 2, 3) for name in ("stem", "mlp.norm", "mlp.down")},
        **{(f"{name}.weight", 1): each(0, 1, 2, 3) for name in ("mlp.up", "head")},
    }
    assert streams.groups["stem"].mixed == "mlp"


def test_two_filters_of_one_module_go_by_their_own_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = opaque(x.movedim(1, -1))
            return functional.linear(x, self.q), functional.linear(x, self.k).movedim(-1, 1)

    @custom_layer(Two)
    def two(layer: Any, x: Any) -> Any:
        layer.reads(x, "q")
        layer.reads(x, "k")
        return layer.makes("q", axis=-1), layer.makes("k")

    class Both(Net):
        def __init__(self) -> None:
            super().__init__(4, head=8)
            self.m = Two()

        def middle(self, x: Tensor) -> Tensor:
            q, k = self.m(x)
            return torch.cat([q.movedim(-1, 1), k], 1)

    graph = trace(Both(), IMAGE)
    assert graph.widths == {"a": 4, "m": 3, "m.k": 5}
    equal_after(Both(), graph, IMAGE)


def test_a_forward_pass_that_no_fake_tensor_goes_through() -> None:
    class Hidden(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(super().forward(x).detach().numpy())

    with pytest.raises(InputError, match="cannot be captured"):
        trace(Middle(Hidden(4, 4, 1)), IMAGE)

    @custom_layer(Hidden, fake=lambda module, x: x.new_empty(len(x), len(module.weight), *x.shape[2:]))
    def hidden(layer: Any, x: Any) -> Any:
        layer.reads(x, "weight")
        return layer.makes("weight", "bias")

    model = Middle(Hidden(4, 4, 1))
    graph = trace(model, IMAGE)
    assert list(graph.groups) == ["a", "m"]
    equal_after(model, graph, IMAGE)
    # 16 pixels; the head once. What is counted for the custom layer is what its description says.
    assert cost_model("macs", model, graph).cost(graph.widths) == 16 * (3 * 4 + 4 * 4) + 4 * 2


def test_multiply_adds_as_described() -> None:
    @custom_layer(Mixed)
    def described(layer: Any, x: Any, offset: Any) -> Any:
        layer.uses("weight", 7)
        return mixed(layer, x, offset)

    model = Offsets()
    graph = trace(model, IMAGE)
    assert graph.uses["m.weight"] == 7
    assert graph.other_macs == 0
    assert cost_model("macs", model, graph).cost(graph.widths) == 16 * (3 * 4 + 3 * 2) + 7 * 4 * 5 + 5 * 2


class Sized(nn.Conv2d):
    """A convolution that takes its width from an attribute."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(opaque(x)).view(len(x), self.width, -1, x.shape[3])


def sized(layer: Any, x: Any) -> Any:
    layer.reads(x, "weight")
    return layer.makes("weight", "bias")


def test_attributes_follow() -> None:
    custom_layer(Sized)(sized)
    model = Middle(Sized())
    graph = trace(model, IMAGE)
    assert list(graph.groups) == ["a", "m"]
    assert [str(rule.attribute) for rule in graph.attributes] == ["m.width"]
    equal_after(model, graph, IMAGE)


def test_a_wrong_description_is_found_out() -> None:
    """Of the layers on both sides of it all goes on."""

    @custom_layer(Sized)
    def wrong(layer: Any, x: Any) -> Any:
        return layer.passes(x, "bias")  # weight is forgotten

    class Longer(Middle):
        def __init__(self) -> None:
            super().__init__(Sized())
            self.b, self.c = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

        def middle(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.m(x)))

    graph = trace(Longer(), IMAGE)
    assert list(graph.groups) == ["b", "c"]
    assert "does not follow its widths" in reasons(graph)["a"]


def test_a_description_that_fits_only_before_the_removal_is_found_out() -> None:
    class Fixed(nn.Module):
        """Four channels from however many."""

        def forward(self, x: Tensor) -> Tensor:
            return opaque(x.mean(1, keepdim=True)).expand(-1, 4, -1, -1)

    @custom_layer(Fixed)
    def wrong(layer: Any, x: Any) -> Any:
        return layer.passes(x, keeps_zero=True)

    class Longer(Middle):
        def __init__(self) -> None:
            super().__init__(Fixed())
            self.b, self.c = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

        def middle(self, x: Tensor) -> Tensor:
            return self.m(self.c(self.b(x)))

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.middle(self.a(x)).flatten(2).amax(2).detach()[:, : self.z.weight.shape[1]])

    graph = trace(Longer(), IMAGE)
    assert list(graph.groups) == ["a", "b"]
    assert "returns" in reasons(graph)["c"]


def test_inside_a_part() -> None:
    custom_layer(Mixed)(mixed)
    model = nn.ModuleDict({"other": nn.ReLU(), "net": Offsets()})
    graph = trace_part(model, "net", IMAGE)
    assert list(graph.groups) == ["net.a", "net.m"]
    assert positions(graph, "net.a")["net.m.weight", 1] == each(0, 1, 2, 3)


def test_the_function_sees_the_module() -> None:
    seen = []

    @custom_layer(Scaled)
    def scaled(layer: Any, x: Any) -> Any:
        seen.append((layer.name, tuple(layer.module.shift.shape), tuple(x.shape)))
        return layer.scales(x, ("gain", 1), "shift")

    @shape_update(Scaled)
    def follow(module: Any, cuts: Any) -> None:
        assert ("gain", 1) in cuts

    trace(Middle(Scaled(lambda x, gain, shift: x * gain + shift)), IMAGE)
    (name, shape, image), (_, smaller, _) = seen
    assert (name, shape, image) == ("m", (4,), (1, 4, 4, 4))
    assert smaller < shape


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda layer, x, offset: layer.makes("wieght"), "names 'wieght', .* did you mean 'weight'"),
        (lambda layer, x, offset: layer.makes(("bias", 1)), r"'bias' of shape \(5,\) has no dimension 1"),
        (lambda layer, x, offset: layer.makes(), r"makes\(\) names no tensor"),
        (lambda layer, x, offset: layer.makes(("weight", 1), "bias"), "4 channels, but m.bias has size 5"),
        (lambda layer, x, offset: layer.reads(x, "weight", dim=0), "4 channels, but m.weight has size 5"),
        (lambda layer, x, offset: layer.reads(x, "weight", axis=4), "has 4 axes, and none numbered 4"),
        (lambda layer, x, offset: layer.reads("x", "weight"), "given a str, which is no activation"),
        (lambda layer, x, offset: layer.adds(x, offset), "given 4 and 2 channels along axis 1"),
        (lambda layer, x, offset: None, "returns None for an output"),
        (lambda layer, x, offset: layer.passes(x), "returns 4 channels for an output of 5 along axis 1"),
        (lambda layer, x, offset: x, r"returns an argument of shape \(1, 4, 4, 4\)"),
        (lambda layer, x, offset: layer.module.nothing, "raises AttributeError"),
        (lambda layer, x: layer.keeps(x), "raises TypeError"),
    ],
)
def test_what_cannot_be_is_refused_by_name(function: Callable[..., Any], message: str) -> None:
    custom_layer(Mixed)(function)
    with pytest.raises(InputError, match=rf"describes the custom layer m \(Mixed\) wrongly: .*{message}"):
        trace(Offsets(), IMAGE)


def test_a_tuple_is_described_by_a_tuple() -> None:
    custom_layer(Mlp)(lambda layer, x, also=False: layer.keeps(x))
    with pytest.raises(InputError, match="returns a Kept, but the module a tuple"):
        trace(Tokens(), TOKENS)


def test_a_custom_layer_inside_another_is_not_looked_at() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sized()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    @custom_layer(Outer)
    def outer(layer: Any, x: Any) -> Any:
        layer.reads(x, "inner.weight")
        return layer.keeps()

    custom_layer(Sized)(lambda layer, x: None)
    model = Middle(Outer())
    graph = trace(model, IMAGE)
    assert positions(graph, "a")["m.inner.weight", 1] == each(0, 1, 2, 3)
    assert reasons(graph) == {"z": "output of the model"}
    assert cost_model("macs", model, graph).cost(graph.widths) == 16 * (3 * 4 + 4 * 4) + 4 * 2
    equal_after(model, graph, IMAGE)
