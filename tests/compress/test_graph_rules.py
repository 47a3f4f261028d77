"""What each kind of operator does to channels, on nets small enough to work out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from compress.budget import cost_model
from compress.graph import ChannelGraph, rule, trace
from compress.graph.rules import RULES


def positions(graph: ChannelGraph, name: str) -> dict[tuple[str, int], list[list[int]]]:
    """(tensor, dim) -> for each channel of the group the positions that go with it."""
    group = graph.groups[name]
    return {
        (part.tensor, part.dim): [part.positions[part.channels == one].tolist() for one in range(group.width)]
        for part in group.slices
    }


def each(*channels: int) -> list[list[int]]:
    """One position per channel."""
    return [[channel] for channel in channels]


def reasons(graph: ChannelGraph) -> dict[str, str]:
    """Frozen layer -> reason."""
    return {layer: frozen.reason for frozen in graph.frozen for layer in frozen.layers}


class Net(nn.Module):
    """A first convolution `a` of `width` channels, whatever a subclass does, and a head `z` that reads it all."""

    def __init__(self, width: int = 4, head: int | None = None) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 1)
        self.z = nn.Linear(width if head is None else head, 2)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.middle(self.a(x)).mean((2, 3)))


IMAGE = torch.zeros(1, 3, 4, 4)


def test_flatten_gives_a_channel_all_its_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 49, 5))
    graph = trace(model, torch.zeros(1, 3, 7, 7))
    assert positions(graph, "0") == {
        ("0.weight", 0): each(0, 1),
        ("0.bias", 0): each(0, 1),
        ("3.weight", 1): [list(range(49)), list(range(49, 98))],
    }


def test_concatenation_shifts_positions() -> None:
    class Concat(Net):
        def __init__(self) -> None:
            super().__init__(2, head=5)
            self.b = nn.Conv2d(2, 3, 1, bias=False)

        def middle(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.b(x)], 1)

    graph = trace(Concat(), IMAGE)
    assert positions(graph, "a") == {
        ("a.weight", 0): each(0, 1),
        ("a.bias", 0): each(0, 1),
        ("b.weight", 1): each(0, 1),
        ("z.weight", 1): each(0, 1),
    }
    assert positions(graph, "b") == {("b.weight", 0): each(0, 1, 2), ("z.weight", 1): each(2, 3, 4)}


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda x: (x[:, 0::2], x[:, 1::2]),
        lambda x: x.unflatten(1, (2, -1)).unbind(1),
    ],
    ids=["chunk", "split", "slices", "strides", "unbind"],
)
def test_halves_lose_the_same_channels(halves) -> None:
    class Halves(Net):
        def __init__(self) -> None:
            super().__init__(4, head=2)

        def middle(self, x: Tensor) -> Tensor:
            first, second = halves(x)
            return first * second.sigmoid()

    graph = trace(Halves(), IMAGE)
    first, second = halves(torch.arange(4)[None])  # the channels that meet
    pairs = [list(pair) for pair in zip(first[0].tolist(), second[0].tolist(), strict=True)]
    assert positions(graph, "a") == {("a.weight", 0): pairs, ("a.bias", 0): pairs, ("z.weight", 1): each(0, 1)}
    assert graph.groups["a"].copies == (2,)
    assert graph.groups["a"].step(8) == 4


def test_halves_that_go_different_ways_still_lose_the_same_channels() -> None:
    """With halves of unequal width, `chunk` would cut at another place."""

    class Halves(Net):
        def __init__(self) -> None:
            super().__init__(4, head=2)
            self.b = nn.Conv2d(2, 2, 1)

        def middle(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return self.b(first) + second

    graph = trace(Halves(), IMAGE)
    assert positions(graph, "a")["a.weight", 0] == [[0, 2], [1, 3]]
    assert positions(graph, "a")["b.weight", 0] == each(0, 1)
    assert positions(graph, "a")["b.weight", 1] == each(0, 1)


@pytest.mark.parametrize(
    ("part", "tied"),
    [
        (lambda x: x[:, : x.shape[1] // 2], [[0, 2], [1, 3]]),
        (lambda x: x[:, x.shape[1] // 2 :], [[0, 2], [1, 3]]),
        (lambda x: x.narrow(1, 0, x.shape[1] // 2), [[0, 2], [1, 3]]),
        (lambda x: x[:, ::2], [[0, 1], [2, 3]]),
        (lambda x: x[:, 1::2], [[0, 1], [2, 3]]),
    ],
    ids=["first half", "second half", "narrow", "even", "odd"],
)
def test_a_part_ties_the_channels_that_it_leaves_out(part, tied: list[list[int]]) -> None:
    """The rest is read too, whole: without the tie a channel of the rest could go and shift the cut."""

    class Part(Net):
        def __init__(self) -> None:
            super().__init__(4, head=6)

        def middle(self, x: Tensor) -> Tensor:
            return torch.cat([x, part(x)], 1)

    assert positions(trace(Part(), IMAGE), "a")["a.weight", 0] == tied


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: x * x.select(1, 3).unsqueeze(1), "one channel is picked by its number"),
        (lambda x: x + x.roll(1, 1), "channels are rolled by a fixed number"),
    ],
    ids=["select", "roll"],
)
def test_channels_taken_by_their_number_stay(middle, reason: str) -> None:
    class Numbered(Net):
        def __init__(self) -> None:
            super().__init__(6)

        def middle(self, x: Tensor) -> Tensor:
            return middle(x)

    graph = trace(Numbered(), IMAGE)
    assert "a" not in graph.groups
    assert any("a" in frozen.layers and frozen.reason == reason for frozen in graph.frozen), graph.frozen


def test_channel_shuffle_follows_the_permutation() -> None:
    class Shuffle(Net):
        def __init__(self) -> None:
            super().__init__(6)

        def middle(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    graph = trace(Shuffle(), IMAGE)
    assert positions(graph, "a") == {
        ("a.weight", 0): [[0, 3], [1, 4], [2, 5]],
        ("a.bias", 0): [[0, 3], [1, 4], [2, 5]],
        ("z.weight", 1): [[0, 1], [2, 3], [4, 5]],
    }


def test_grouped_convolution_loses_the_same_positions_from_every_group() -> None:
    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__(6, head=8)
            self.b = nn.Conv2d(6, 8, 3, padding=1, groups=2)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    graph = trace(Grouped(), IMAGE)
    assert positions(graph, "a") == {
        ("a.weight", 0): [[0, 3], [1, 4], [2, 5]],
        ("a.bias", 0): [[0, 3], [1, 4], [2, 5]],
        ("b.weight", 1): each(0, 1, 2),
    }
    fours = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert positions(graph, "b") == {("b.weight", 0): fours, ("b.bias", 0): fours, ("z.weight", 1): fours}


def test_depthwise_convolution_belongs_to_the_group_of_its_input() -> None:
    class Depthwise(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    graph = trace(Depthwise(), IMAGE)
    assert list(graph.groups) == ["a"]
    assert positions(graph, "a") == {
        ("a.weight", 0): each(0, 1, 2, 3),
        ("a.bias", 0): each(0, 1, 2, 3),
        ("b.weight", 0): each(0, 1, 2, 3),
        ("z.weight", 1): each(0, 1, 2, 3),
    }
    assert [producer.layer for producer in graph.groups["a"].producers] == ["a", "b"]
    assert graph.groups["a"].consumers == ("z",)


def test_depth_multiplier_gives_an_input_channel_several_output_channels() -> None:
    class Multiplier(Net):
        def __init__(self) -> None:
            super().__init__(3, head=6)
            self.b = nn.Conv2d(3, 6, 1, groups=3)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    graph = trace(Multiplier(), IMAGE)
    assert positions(graph, "a")["a.weight", 0] == each(0, 1, 2)
    assert positions(graph, "a")["b.weight", 0] == [[0, 1], [2, 3], [4, 5]]
    assert positions(graph, "a")["z.weight", 1] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("gate", [torch.sigmoid, functional.hardsigmoid])
def test_squeeze_and_excite_ties_the_scale_to_what_it_scales(gate) -> None:
    class SqueezeExcite(Net):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

        def middle(self, x: Tensor) -> Tensor:
            return x * gate(self.excite(self.squeeze(functional.adaptive_avg_pool2d(x, 1)).relu()))

    graph = trace(SqueezeExcite(), IMAGE)
    group = graph.groups["a"]
    assert [producer.layer for producer in group.producers] == ["a", "excite"]
    assert group.consumers == ("squeeze", "z")
    assert group.gate_slots == (("a.weight", 0), ("a.bias", 0))
    assert group.residue is None
    assert positions(graph, "squeeze") == {
        ("squeeze.weight", 0): each(0, 1),
        ("squeeze.bias", 0): each(0, 1),
        ("excite.weight", 1): each(0, 1),
    }


def test_transposed_convolution_has_its_channels_the_other_way_round() -> None:
    class Transposed(Net):
        def __init__(self) -> None:
            super().__init__(2, head=3)
            self.b = nn.ConvTranspose2d(2, 3, 2, stride=2)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    graph = trace(Transposed(), IMAGE)
    assert positions(graph, "a")["b.weight", 0] == each(0, 1)
    assert positions(graph, "b") == {
        ("b.weight", 1): each(0, 1, 2),
        ("b.bias", 0): each(0, 1, 2),
        ("z.weight", 1): each(0, 1, 2),
    }


def test_prelu_with_a_slope_per_channel_and_with_one() -> None:
    class Slopes(Net):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.b = nn.PReLU(count)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    assert positions(trace(Slopes(4), IMAGE), "a")["b.weight", 0] == each(0, 1, 2, 3)
    assert ("b.weight", 0) not in positions(trace(Slopes(1), IMAGE), "a")


def test_bare_scale_and_bias_belong_to_the_channels() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1))
            self.shift = nn.Parameter(torch.rand(1, 4, 1, 1))

        def middle(self, x: Tensor) -> Tensor:
            return x * self.scale + self.shift

    graph = trace(Scaled(), IMAGE)
    assert positions(graph, "a")["scale", 0] == each(0, 1, 2, 3)
    assert positions(graph, "a")["shift", 1] == each(0, 1, 2, 3)
    # Zero at every reader only when the shift is 0 too.
    assert set(graph.groups["a"].gate_slots) == {("a.weight", 0), ("a.bias", 0), ("shift", 1)}


def test_frozen_batch_norm_is_cut_and_leaves_the_residue_to_be_known() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = FrozenBatchNorm2d(4)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    graph = trace(Frozen(), IMAGE)
    tensors = {slot for slot in positions(graph, "a") if slot[0].startswith("b.")}
    assert tensors == {("b.weight", 0), ("b.bias", 0), ("b.running_mean", 0), ("b.running_var", 0)}
    assert graph.groups["a"].gate_slots == (("a.weight", 0), ("a.bias", 0))
    assert graph.groups["a"].residue == "z"


def test_batch_norm_without_affine_parameters_is_no_gate() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.BatchNorm2d(4, affine=False)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x)

    group = trace(Plain(), IMAGE).groups["a"]
    assert group.gate_slots == (("a.weight", 0), ("a.bias", 0))
    assert group.producers[0].norms == ()
    assert group.residue == "z"


def test_sigmoid_before_a_consumer_leaves_a_residue() -> None:
    class Sigmoid(Net):
        def middle(self, x: Tensor) -> Tensor:
            return x.sigmoid()

    assert trace(Sigmoid(), IMAGE).groups["a"].residue == "z"


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 4), nn.LayerNorm([4, 4, 4])], ids=["group", "layer"])
def test_normalisation_over_channels_freezes(norm: nn.Module) -> None:
    class Normalised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def middle(self, x: Tensor) -> Tensor:
            return self.norm(x)

    graph = trace(Normalised(), IMAGE)
    assert not graph.groups
    assert "changes the statistics of the others" in reasons(graph)["a"]


class OneAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.z = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.z(x + self.b(x, x, x, need_weights=False)[0])


def test_heads_of_attention_go_as_wholes() -> None:
    graph = trace(OneAttention(), torch.zeros(1, 5, 3))
    assert graph.widths == {"a": 4, "b": 2}
    heads = graph.groups["b"]
    first = heads.positions(torch.tensor([0]))  # its rows of query, key and value, its columns of the output
    assert {slot: positions.tolist() for slot, positions in first.items()} == {
        ("b.in_proj_weight", 0): [0, 1, 4, 5, 8, 9],
        ("b.in_proj_bias", 0): [0, 1, 4, 5, 8, 9],
        ("b.out_proj.weight", 1): [0, 1],
    }
    # A head is gated by its values: with these at 0 it adds nothing.
    gates = {(part.tensor, part.dim): (part.positions.tolist(), part.channels.tolist()) for part in heads.gates}
    values = ([8, 9, 10, 11], [0, 0, 1, 1])
    assert gates == {("b.in_proj_weight", 0): values, ("b.in_proj_bias", 0): values}
    assert heads.exact
    assert heads.copies == (6,)


def test_multiply_adds_of_attention_follow_the_heads() -> None:
    model = OneAttention()
    graph = trace(model, torch.zeros(1, 5, 3))
    # Two products of 5 x 5 positions for each of the 4 channels in 2 heads of 2.
    assert [product.value(graph.widths) for product in graph.products] == [5 * 5 * 4, 5 * 5 * 4]
    assert graph.other_macs == 0
    macs = cost_model("macs", model, graph)
    layers = 3 * 4 + 4 * 12 + 4 * 4 + 4 * 2
    assert macs.cost(graph.widths) == 5 * layers + 200
    # With one head less: half the rows of the projection, half the columns of the output, half the products.
    assert macs.gain("b", graph.widths, 1) == 5 * (4 * 6 + 4 * 2) + 100


def test_operator_without_rule_freezes_what_it_touches_and_is_reported() -> None:
    class Cumulative(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Conv2d(4, 4, 1)

        def middle(self, x: Tensor) -> Tensor:
            return torch.cummax(self.b(x), 1).values

    graph = trace(Cumulative(), IMAGE)
    assert list(graph.groups) == ["a"]
    assert reasons(graph)["b"] == "operator aten.cummax.default has no rule"
    assert list(graph.operators_without_rule) == ["aten.cummax.default"]


def test_a_user_can_add_a_rule() -> None:
    @torch.library.custom_op("espalier_test::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    doubled.register_fake(torch.empty_like)

    class Doubled(Net):
        def middle(self, x: Tensor) -> Tensor:
            return torch.ops.espalier_test.doubled(x)

    operator = torch.ops.espalier_test.doubled.default
    graph = trace(Doubled(), IMAGE)
    assert not graph.groups
    assert list(graph.operators_without_rule) == ["espalier_test.doubled.default"]
    rule(operator)(lambda walk, node, x: x.moved(x.labels))
    try:
        assert positions(trace(Doubled(), IMAGE), "a")["z.weight", 1] == each(0, 1, 2, 3)
    finally:
        del RULES[operator]


def test_size_read_from_an_attribute_follows() -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4
            self.b = nn.Conv2d(4, 4, 1)

        def middle(self, x: Tensor) -> Tensor:
            return self.b(x).view(-1, 2, self.width // 2, *x.shape[2:]).flatten(1, 2)

    graph = trace(Fixed(), IMAGE)
    assert graph.widths == {"a": 4, "b": 2}  # a channel of `b` is one in each half
    assert [str(rule.attribute) for rule in graph.attributes] == ["width"]


def test_split_at_a_fixed_place_freezes() -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__(6, head=6)
            self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1)

        def middle(self, x: Tensor) -> Tensor:
            first, second = x.split((2, 4), 1)
            return torch.cat((self.b(first), self.c(second)), 1)

    graph = trace(Fixed(), IMAGE)
    assert list(graph.groups) == ["b", "c"]
    assert "a" in reasons(graph)


def test_channels_behind_an_unequal_slice_can_go() -> None:
    class Leading(Net):
        def __init__(self) -> None:
            super().__init__(6)

        def middle(self, x: Tensor) -> Tensor:
            return x * x[:, :4].mean(1, keepdim=True)

    graph = trace(Leading(), IMAGE)
    assert positions(graph, "a")["a.weight", 0] == each(4, 5)
    assert "over channels" in reasons(graph)["a"]


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2 (arXiv 2301.00808, algorithm 1), over axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(dim=(2, 3), keepdim=True)
        return x + x * norms / (norms.mean(1, keepdim=True) + 1e-6)


def test_a_mixing_operator_without_parameters_is_named_by_its_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ResponseNorm(), nn.Conv2d(4, 2, 1))
    assert "aten.mean.dim over channels depends on their number" in reasons(trace(model, IMAGE))["0"]
    assert trace(model, IMAGE, embedding=True).groups["0"].mixed == "1"


@pytest.mark.parametrize("quarter", [4, 8])
def test_unequal_split_by_shape_removes_the_same_of_every_quarter(quarter: int) -> None:
    """The cut at a quarter of the width stays in its place when every quarter loses the same channels."""

    class Quarter(Net):
        def __init__(self) -> None:
            super().__init__(4 * quarter, head=5)
            self.b, self.c = nn.Conv2d(quarter, 5, 1), nn.Conv2d(3 * quarter, 5, 1)

        def middle(self, x: Tensor) -> Tensor:
            width = x.shape[1]
            return self.b(x[:, : width // 4]) + self.c(x[:, width // 4 :])

    graph = trace(Quarter(), IMAGE)
    assert graph.widths == {"a": quarter, "b": 5}
    assert positions(graph, "a")["a.weight", 0][0] == [0, quarter, 2 * quarter, 3 * quarter]
    assert positions(graph, "a")["c.weight", 1][0] == [0, quarter, 2 * quarter]


def test_unequal_split_at_a_third_place_freezes() -> None:
    """Nothing keeps the cut at two fifths of the width in its place, unless both parts lost the same fraction."""

    class Fifths(Net):
        def __init__(self) -> None:
            super().__init__(20, head=5)
            self.b, self.c = nn.Conv2d(8, 5, 1), nn.Conv2d(12, 5, 1)

        def middle(self, x: Tensor) -> Tensor:
            width = x.shape[1]
            return self.b(x[:, : 2 * width // 5]) + self.c(x[:, 2 * width // 5 :])

    graph = trace(Fifths(), IMAGE)
    assert list(graph.groups) == ["b"]
    assert "a" in reasons(graph)


def test_pixel_shuffle_by_view_removes_whole_blocks() -> None:
    class Shuffle(Net):
        def __init__(self) -> None:
            super().__init__(12, head=3)

        def middle(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)

    graph = trace(Shuffle(), IMAGE)
    assert positions(graph, "a")["a.weight", 0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_inputs_and_outputs_are_never_pruned() -> None:
    class Constant(Net):
        def middle(self, x: Tensor) -> Tensor:
            return x + torch.zeros(1, 4, 4, 4)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1))
    assert list(trace(model, IMAGE).groups) == ["0"]
    assert reasons(trace(model, IMAGE)) == {"1": "output of the model"}

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.z = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(x + self.a(x))

    assert reasons(trace(Residual(), IMAGE))["a"] == "input of the model"
    assert reasons(trace(Constant(), IMAGE))["a"] == "combined with a constant of fixed width"
