"""Operators in unusual company: what can go, and removal compared with zeroing, on nets of a few channels."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_removal_equals_zeroing import relative_error, zeroed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from compress.budget import cost_model
from compress.errors import InputError
from compress.graph import ChannelGraph, trace

Forward = Callable[..., Tensor]


class Net(nn.Module):
    """Modules and parameters by name, and a forward pass that is given the net and its inputs."""

    def __init__(self, forward: Forward, **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self, *inputs)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1)


def line(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def vector(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(size) + 0.5)


def numbers(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


IMAGE, TOKENS = numbers(2, 3, 4, 4), numbers(2, 7, 5)


def randomised(model: nn.Module) -> nn.Module:
    """In double precision and evaluation mode, no parameter constant."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def half(graph: ChannelGraph) -> dict[str, Tensor]:
    """Every second channel of each group."""
    return {name: torch.arange(0, width - 1, 2) for name, width in graph.widths.items()}


def pruned_equals_zeroed(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> ChannelGraph:
    """The channel graph of a net that loses half of its channels, and of which everything is checked that is promised.

    These are the output, that of the net in which the channels are 0, and the multiply-adds.
    """
    graph = trace(model, inputs, **options)
    traced, removals = graph.copy(), half(graph)
    with torch.no_grad():
        expected = zeroed(model, graph, removals)(*inputs)
        cost = cost_model("macs", model, graph)
        counted(model, inputs, cost.cost(graph.widths))
        graph.remove_from(model, removals)
        assert relative_error(model(*inputs), expected) < 1e-9
        counted(model, inputs, cost.cost(graph.widths))
    return traced


def counted(model: nn.Module, inputs: tuple[Tensor, ...], expected: float) -> None:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert counter.get_total_flops() / 2 / len(inputs[0]) == pytest.approx(expected)


def gqa(net: Any, x: Tensor) -> Tensor:
    query, key, value = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    mixed = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return net.z(mixed.transpose(1, 2).flatten(2))


def fused(net: Any, x: Tensor) -> Tensor:
    """Features weighted by normalised weights of the inputs (a BiFPN)."""
    weights = net.w.relu()
    weights = weights / (weights.sum() + 1e-4)
    return net.z(weights[0] * net.a(x) + weights[1] * net.b(x))


def cats(net: Any, x: Tensor) -> Tensor:
    return net.z(torch.cat([net.a(x), net.b(x).sigmoid()], 1))


TABLE = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [1, 1, 2, 2, 4, 4, 0]])
PLACES = numbers(2, 3, 3, 2).tanh()

# forward pass, parts, inputs, group -> (width, residue)
CASES: dict[str, tuple[Forward, dict[str, Any], tuple[Tensor, ...], dict[str, tuple[int, str | None]]]] = {
    # One channel that meets many stays, so that what it is added to does not vanish.
    "add-one": (
        lambda net, x: net.z(net.a(x) + net.b(x)),
        {"a": conv(3, 8), "b": conv(3, 1), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, "z")},
    ),
    "add-positions": (
        lambda net, x: net.z(net.a(x).relu() + net.p),
        {"a": line(5, 8), "p": vector(7, 1), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, "z")},
    ),
    "maximum-one": (
        lambda net, x: net.z(torch.maximum(net.a(x), net.b(x))),
        {"a": conv(3, 8), "b": conv(3, 1), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, "z")},
    ),
    "multiply-one": (
        lambda net, x: net.z(net.b(x).relu() * net.a(x)),
        {"a": conv(3, 8), "b": conv(3, 1), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    "multiply-sigmoid-by-one": (
        lambda net, x: net.z(net.b(x) * net.a(x).sigmoid()),
        {"a": conv(3, 8), "b": conv(3, 1), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, "z")},
    ),
    "weighted-sum": (
        fused,
        {"a": conv(3, 8), "b": conv(3, 8), "z": conv(8, 2), "w": vector(2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    # Parts of a concatenation are exact each by itself.
    "cat-input": (
        lambda net, x: net.z(torch.cat([net.a(x), x], 1)),
        {"a": conv(3, 8), "z": conv(11, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    "cat-sigmoid": (
        cats,
        {"a": conv(3, 4), "b": conv(3, 6), "z": conv(10, 2)},
        (IMAGE,),
        {"a": (4, None), "b": (6, "z")},
    ),
    "cat-crossed": (
        lambda net, x: net.z(torch.cat([net.a(x), net.b(x).sigmoid()], 1) + torch.cat([net.b(x), net.a(x)], 1)),
        {"a": conv(3, 4), "b": conv(3, 4), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (4, "z")},
    ),
    # Matrices as layers.
    "matmul-matrix": (
        lambda net, x: net.z((net.a(x) @ net.w).relu()),
        {"a": line(5, 8), "w": vector(8, 4), "z": line(4, 2)},
        (TOKENS,),
        {"a": (8, None), "w": (4, None)},
    ),
    "matrix-matmul": (
        lambda net, x: net.z((net.w.weight @ net.a(x).flatten(2)).relu().mT),
        {"a": conv(3, 8), "w": line(8, 4), "z": line(4, 2)},
        (IMAGE,),
        {"a": (8, None), "w": (4, None)},
    ),
    "matmul-positions": (
        lambda net, x: net.z((net.a(x).mT @ net.w).relu().mT),
        {"a": line(5, 8), "w": vector(7, 7), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, None)},
    ),
    "matrices-added-to": (
        lambda net, x: net.z(x @ net.w + net.p),
        {"w": vector(5, 8), "p": vector(7, 8), "z": line(8, 2)},
        (TOKENS,),
        {"w": (8, None)},
    ),
    "addmm": (
        lambda net, x: net.z(torch.addmm(net.w.bias, net.a(x), net.w.weight.t()).relu()),
        {"a": line(5, 8), "w": line(8, 4), "z": line(4, 2)},
        (TOKENS[0],),
        {"a": (8, None), "w": (4, None)},
    ),
    "tensordot": (
        lambda net, x: net.z(torch.tensordot(net.a(x), net.w.weight, dims=([2], [1])).relu()),
        {"a": line(5, 8), "w": line(8, 4), "z": line(4, 2)},
        (TOKENS,),
        {"a": (8, None), "w": (4, None)},
    ),
    "einsum-matrix": (
        lambda net, x: net.z(torch.einsum("...c,oc->...o", net.a(x), net.w.weight)),
        {"a": line(5, 8), "w": line(8, 4), "z": line(4, 2)},
        (TOKENS,),
        {"a": (8, None), "w": (4, None)},
    ),
    "einsum-matrix-first": (
        lambda net, x: net.z(torch.einsum("oc,bchw->bohw", net.w.weight, net.a(x)).relu()),
        {"a": conv(3, 8), "w": line(8, 4), "z": conv(4, 2)},
        (IMAGE,),
        {"a": (8, None), "w": (4, None)},
    ),
    "einsum-ellipsis": (
        lambda net, x: torch.einsum("...lc,...sc->...ls", net.a(x), net.b(x)),
        {"a": line(5, 8), "b": line(5, 8)},
        (TOKENS,),
        {"a": (8, None)},
    ),
    "einsum-no-sum": (
        lambda net, x: net.z(torch.einsum("bnc,bmc->bnmc", net.a(x), net.b(x))),
        {"a": line(5, 8), "b": line(5, 8), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, None)},
    ),
    "einsum-permutes-and-sums": (
        lambda net, x: (
            net.z(torch.einsum("bchw->whbc", net.a(x))) * torch.einsum("bchw->wh", net.a(x))[..., None, None]
        ),
        {"a": conv(3, 8), "z": line(8, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    # Operators with rules of their own.
    "gqa": (
        gqa,
        {"q": line(5, 16), "k": line(5, 8), "v": line(5, 8), "z": line(16, 2)},
        (TOKENS,),
        {"q": (4, None)},
    ),
    "glu": (
        lambda net, x: net.z(functional.glu(net.a(x), -1)),
        {"a": line(5, 8), "z": line(4, 2)},
        (TOKENS,),
        {"a": (4, None)},
    ),
    "embedding": (
        lambda net, x, numbers: net.z(net.a(x) + net.e(numbers)),
        {"a": line(5, 8), "e": nn.Embedding(5, 8), "z": line(8, 2)},
        (TOKENS, TABLE),
        {"a": (8, None)},
    ),
    "where-scalar": (
        lambda net, x: net.z(torch.where(x[:, :1] > 0, net.a(x), 0.0) + torch.where(x[:, :1] > 0, 0.0, net.a(x))),
        {"a": conv(3, 8), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    "where-one": (
        lambda net, x: net.z(torch.where(x[:, :1] > 0, net.a(x), 1.0)),
        {"a": conv(3, 8), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, "z")},
    ),
    "shuffle": (
        lambda net, x: net.z(functional.channel_shuffle(net.a(x), 2)),
        {"a": conv(3, 8), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (4, None)},
    ),
    "nearest-exact": (
        lambda net, x: net.z(functional.interpolate(net.a(x), scale_factor=2, mode="nearest-exact")),
        {"a": conv(3, 8), "z": conv(8, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    "max-pool-3d": (
        lambda net, x: net.z(functional.adaptive_max_pool3d(net.a(x)[..., None], 1).flatten(1)),
        {"a": conv(3, 8), "z": line(8, 2)},
        (IMAGE,),
        {"a": (8, None)},
    ),
    "grid-sample": (
        lambda net, x, places: net.z(functional.grid_sample(net.a(x), places, align_corners=False)),
        {"a": conv(3, 8), "z": conv(8, 2)},
        (IMAGE, PLACES),
        {"a": (8, None)},
    ),
    "cosine": (
        lambda net, x: functional.cosine_similarity(net.a(x), net.b(x), -1),
        {"a": line(5, 8), "b": line(5, 8)},
        (TOKENS,),
        {"a": (8, None)},
    ),
    "sorted-positions": (
        lambda net, x: net.z(net.a(x).sort(1)[0][:, :3] + net.a(x).topk(3, 1)[0]),
        {"a": line(5, 8), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, None)},
    ),
    "log-sum-of-positions": (
        lambda net, x: net.z(net.a(x).logsumexp(1) + net.a(x).prod(1)),
        {"a": line(5, 8), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, "z")},
    ),
    "power": (
        lambda net, x: net.z(net.a(x).abs() ** net.b(x)),
        {"a": line(5, 8), "b": line(5, 8), "z": line(8, 2)},
        (TOKENS,),
        {"a": (8, "z")},
    ),
    "norm-of-order-1": (
        lambda net, x: net.a(x).norm(p=1, dim=1),
        {"a": conv(3, 8)},
        (IMAGE,),
        {"a": (8, None)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_removal_is_what_it_is_said_to_be(case: str) -> None:
    forward, parts, inputs, expected = CASES[case]
    graph = pruned_equals_zeroed(randomised(Net(forward, **copy.deepcopy(parts))), inputs)
    assert {name: (group.width, group.residue) for name, group in graph.groups.items()} == expected
    assert not graph.operators_without_rule


# forward pass over the channels of `a`, width of what it returns
MIXING: dict[str, tuple[Forward, int]] = {
    "norm of order -inf": (lambda x: x.norm(p=-float("inf"), dim=-1), 7),
    "norm of order 1/2": (lambda x: x.norm(p=0.5, dim=-1), 7),
    "sort": (lambda x: x.sort(-1)[0], 8),
    "topk": (lambda x: x.topk(4)[0], 4),
    "logsumexp": (lambda x: x.logsumexp(-1), 7),
    "product": (lambda x: x.prod(-1), 7),
}


@pytest.mark.parametrize("case", MIXING)
def test_over_channels_they_stay(case: str) -> None:
    over, width = MIXING[case]
    model = Net(lambda net, x: net.z(over(net.a(x))), a=line(5, 8), z=line(width, 2))
    assert not trace(model.double(), TOKENS).groups


def gates(graph: ChannelGraph, group: str) -> dict[tuple[str, int], list[int]]:
    return {(part.tensor, part.dim): part.positions.tolist() for part in graph.groups[group].gates}


def test_one_weight_with_two_biases_is_gated_with_both() -> None:
    model = Net(
        lambda net, x: net.z(net.a(x) + net.b(net.e(x))), e=line(5, 5), a=line(5, 4), b=line(5, 4), z=line(4, 2)
    )
    model.b.weight = model.a.weight
    graph = pruned_equals_zeroed(randomised(model), (TOKENS,), ignore=["e"])
    assert [*gates(graph, "a")] == [("a.weight", 0), ("a.bias", 0), ("b.bias", 0)]


def test_one_scale_of_two_normalisations_is_gated_with_both_shifts() -> None:
    model = Net(
        lambda net, x: net.z(net.n(net.a(x)).relu() + net.m(net.a(x)).relu()),
        a=conv(3, 4),
        n=nn.BatchNorm2d(4),
        m=nn.BatchNorm2d(4),
        z=conv(4, 2),
    )
    model.m.weight = model.n.weight
    graph = pruned_equals_zeroed(randomised(model), (IMAGE,))
    assert [*gates(graph, "a")] == [("n.weight", 0), ("n.bias", 0), ("m.bias", 0)]


def test_the_gate_of_a_product_is_the_factor_that_it_is_linear_in() -> None:
    def swiglu(net: Any, x: Tensor) -> Tensor:
        gate, value = net.a(x).chunk(2, -1)
        return net.z(functional.silu(gate) * value)

    graph = pruned_equals_zeroed(randomised(Net(swiglu, a=line(5, 8), z=line(4, 2))), (TOKENS,))
    assert gates(graph, "a") == {("a.weight", 0): [4, 5, 6, 7], ("a.bias", 0): [4, 5, 6, 7]}


def test_the_gates_of_linear_attention_are_the_values() -> None:
    def attention(net: Any, x: Tensor) -> Tensor:
        query, key, value = net.a(x).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        query, key = query.relu(), key.relu()
        scale = query @ key.sum(-2).unsqueeze(-1) + 1
        return net.z((query @ (key.mT @ value) / scale).transpose(1, 2).flatten(2))

    graph = pruned_equals_zeroed(randomised(Net(attention, a=line(5, 18), z=line(6, 2))), (TOKENS,))
    assert graph.widths == {"a": 3}
    assert gates(graph, "a")["a.weight", 0] == [12, 13, 14, 15, 16, 17]


def test_weight_and_its_mask_are_the_weights() -> None:
    def masked(net: Any, x: Tensor) -> Tensor:
        return net.z(functional.conv2d(net.a(x), net.mask * net.b.weight, net.b.bias).relu())

    model = Net(masked, a=conv(3, 4), b=conv(4, 6), z=conv(6, 2))
    model.register_buffer("mask", (numbers(6, 4, 1, 1) > 0).double())
    graph = pruned_equals_zeroed(randomised(model), (IMAGE,))
    assert [(group.filters, group.readers) for group in graph.groups.values()] == [
        ((("a.weight", 0),), (("b.weight", 1),)),
        ((("b.weight", 0),), (("z.weight", 1),)),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hooks() -> None:
    model = (
        nn.Sequential(conv(3, 4), nn.ReLU(), nn.utils.weight_norm(conv(4, 6)), nn.ReLU(), conv(6, 2)).double().eval()
    )
    graph = trace(model, IMAGE)
    assert graph.widths == {"2": 6}
    assert [*gates(graph, "2")] == [("2.weight_g", 0), ("2.bias", 0)]
    dense, (last,) = model(IMAGE), [model[4].weight.detach().clone()]
    graph.remove_from(model, {"2": torch.tensor([1, 4])})
    assert model[2].weight_v.shape == (4, 4, 1, 1)
    with torch.no_grad():
        assert model(IMAGE).shape == dense.shape
        assert torch.equal(model[4].weight, last[:, [0, 2, 3, 5]])


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    model[0].memory = {model[0].weight * 2}  # a set, into which the search for such tensors does not look
    with pytest.raises(InputError, match="cannot be copied"):
        trace(model, IMAGE.float())


def test_a_cache_with_a_history_is_no_obstacle() -> None:
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    model[0].cache = {"cpu": [model[0].weight * 2]}
    assert trace(model, IMAGE.float()).widths == {"0": 4}
    assert model[0].cache["cpu"][0].grad_fn is not None
