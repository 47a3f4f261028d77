"""Attention and other products of activations, tables of biases, computed weights: which slices go together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import cost_model
from compress.graph import ChannelGraph, trace

TOKENS = torch.zeros(1, 5, 3)
"""One image of 5 tokens with 3 channels."""


class Attention(nn.Module):
    """Two heads of two channels on a stream of 4, projections apart; `scores` may add to the scores (N, H, L, L)."""

    def __init__(self, scores: Callable[[Tensor], Tensor] = lambda scores: scores) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.proj, self.z = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scores = scores

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).transpose(1, 2)  # (N, H, L, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = self.scores(q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.z(x + self.proj((weights @ v).transpose(1, 2).flatten(2)))


def positions(graph: ChannelGraph, name: str) -> dict[tuple[str, int], list[list[int]]]:
    """(tensor, dim) -> for each channel of the group the positions that go with it."""
    group = graph.groups[name]
    return {
        (part.tensor, part.dim): [part.positions[part.channels == one].tolist() for one in range(group.width)]
        for part in group.slices
    }


def reasons(graph: ChannelGraph) -> dict[str, str]:
    return {layer: frozen.reason for frozen in graph.frozen for layer in frozen.layers}


def test_heads_have_rows_of_three_layers_and_columns_of_a_fourth() -> None:
    graph = trace(Attention(), TOKENS)
    assert graph.widths == {"a": 4, "q": 2}
    both = [[0, 1], [2, 3]]
    made = {(f"{layer}.{tensor}", 0): both for layer in "qkv" for tensor in ("weight", "bias")}
    assert positions(graph, "q") == made | {("proj.weight", 1): both}
    assert graph.groups["q"].gate_slots == (("v.weight", 0), ("v.bias", 0))
    assert graph.groups["q"].consumers == ("proj",)
    assert graph.groups["a"].exact


def test_widths_of_heads_go_in_all_heads_at_once() -> None:
    """Queries and keys of one width, values of another; the scale is a number that does not follow."""

    class ByHeads(Attention):
        def split(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (2, -1)).transpose(1, 2)

    graph = trace(ByHeads(), TOKENS, attention="widths")
    assert graph.widths == {"a": 4, "q": 2, "v": 2}
    columns = [[0, 2], [1, 3]]
    scored = {(f"{layer}.{tensor}", 0): columns for layer in "qk" for tensor in ("weight", "bias")}
    assert positions(graph, "q") == scored
    assert graph.groups["q"].gate_slots == (("q.weight", 0), ("q.bias", 0))  # gating the keys too would square it
    valued = {("v.weight", 0): columns, ("v.bias", 0): columns, ("proj.weight", 1): columns}
    assert positions(graph, "v") == valued
    assert trace(ByHeads(), TOKENS, attention="keep").widths == {"a": 4}


@pytest.mark.parametrize("kept", ["q", "v"])
def test_multiply_adds_of_widths(kept: str) -> None:
    class ByHeads(Attention):
        def split(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (2, -1)).transpose(1, 2)

    model = ByHeads()
    graph = trace(model, TOKENS, attention="widths")
    macs = cost_model("macs", model, graph)
    # Two layers of 4 x 4 lose half their rows or columns, and one product of 2 heads half of its 2 channels.
    assert macs.gain(kept, graph.widths, 1) == 5 * (4 * 2 + 4 * 2) + 5 * 5 * 2


def test_a_scale_computed_from_the_width_keeps_the_widths() -> None:
    class Scaled(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8)
            self.proj = nn.Linear(8, 4)

        def split(self, x: Tensor) -> Tensor:
            parts = x.unflatten(-1, (2, -1)).transpose(1, 2)
            return parts / parts.shape[-1] ** 0.25

    graph = trace(Scaled(), TOKENS, attention="widths")
    assert "q" not in graph.groups
    assert "number" in reasons(graph)["q"]


def with_table() -> nn.Module:
    class Tabled(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 2))
            self.register_buffer("index", torch.arange(25).view(5, 5) % 7)
            self.scores = self.biased

        def biased(self, scores: Tensor) -> Tensor:
            return scores + self.table[self.index].permute(2, 0, 1)

    return Tabled()


def test_a_table_of_position_biases_loses_a_column_with_each_head() -> None:
    graph = trace(with_table(), TOKENS)
    assert positions(graph, "q")["table", 1] == [[0], [1]]
    assert ("table", 0) not in positions(graph, "q")


def test_a_mask_of_the_scores_ties_nothing() -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    graph = trace(Attention(lambda scores: scores.masked_fill(~mask, -9.0)), TOKENS)
    assert graph.widths == {"a": 4, "q": 2}


def test_one_head_without_a_head_axis_prunes_queries_and_keys_by_channel() -> None:
    class Single(Attention):
        def split(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            weights = (self.q(x) @ self.k(x).mT * 0.5).softmax(-1)
            return self.z(x + self.proj(weights @ self.v(x)))

    graph = trace(Single(), TOKENS)
    assert graph.widths == {"a": 4, "q": 4, "v": 4}
    assert graph.groups["q"].gate_slots == (("q.weight", 0), ("q.bias", 0))
    assert positions(graph, "q")["k.weight", 0] == [[0], [1], [2], [3]]


class Normalised(nn.Module):
    """A residual stream that a layer normalises before it is read."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.z = nn.Linear(3, 4), norm, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.z(x + self.b(self.norm(x)).relu())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)])
def test_what_a_norm_mixes_goes_by_option_and_is_marked(norm: nn.Module) -> None:
    assert "over channels" in reasons(trace(Normalised(norm), TOKENS))["a"]
    graph = trace(Normalised(norm), TOKENS, embedding=True)
    group = graph.groups["a"]
    assert (group.mixed, group.residue, group.exact) == ("norm", None, False)
    assert ("norm.weight", 0) in group.gate_slots
    assert positions(graph, "a")["norm.weight", 0] == [[0], [1], [2], [3]]


def test_an_mlp_over_tokens_loses_hidden_channels_while_the_stream_stays() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.z = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.z(x + self.down(self.up(self.norm(x).mT).relu()).mT)

    graph = trace(Mixer(), TOKENS)
    hidden = [[0], [1], [2], [3], [4], [5]]
    assert positions(graph, "up") == {("up.weight", 0): hidden, ("up.bias", 0): hidden, ("down.weight", 1): hidden}
    assert graph.groups["up"].exact
    assert list(reasons(graph)) == ["a", "down", "z"]
    stream = trace(Mixer(), TOKENS, embedding=True)
    assert stream.widths == {"a": 4}
    assert reasons(stream)["up"] == reasons(stream)["down"] == "linear layer over one of several channel axes"
    assert cost_model("macs", Mixer(), stream).cost({"a": 4}) == 5 * 3 * 4 + 2 * 4 * 5 * 6 + 5 * 4 * 2


def test_groups_of_a_group_norm_go_as_wholes_and_exactly() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.z = nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.norm(self.a(x)).relu())

    graph = trace(Net(), torch.zeros(1, 3, 4, 4))
    assert positions(graph, "a")["a.weight", 0] == [[0, 1], [2, 3], [4, 5]]
    assert graph.groups["a"].exact
    assert graph.groups["a"].gate_slots == (("norm.weight", 0), ("norm.bias", 0))


class Standardised(nn.Conv2d):
    """A convolution with standardised weights and a gain (Brock et al. 2021, arXiv 2102.06171, equation 1)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(len(self.weight), 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return functional.conv2d(x, rows.view_as(self.weight) * self.gain, self.bias)


def test_standardised_weights_make_channels_freely_and_read_them_by_option() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Standardised(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    assert graph.widths == {"1": 6}
    assert graph.groups["1"].exact
    assert graph.groups["1"].gate_slots == (("1.gain", 0), ("1.bias", 0))
    assert "normalised over the channels that it reads" in reasons(graph)["0"]
    free = trace(model, torch.zeros(1, 3, 4, 4), embedding=True)
    assert free.widths == {"0": 4, "1": 6}
    assert free.groups["0"].mixed == "1"


def test_a_position_embedding_goes_with_the_channels_that_it_is_added_to() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.place, self.z = nn.Linear(3, 4), nn.Parameter(torch.randn(1, 5, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.a(x) + self.place)

    graph = trace(Placed(), TOKENS)
    assert graph.widths == {"a": 4}
    assert ("place", 2) in graph.groups["a"].gate_slots
    assert ("place", 1) not in positions(graph, "a")
