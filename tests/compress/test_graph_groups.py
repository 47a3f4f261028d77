"""Names, producers, consumers, gates and sizes of groups, and how a graph follows removals."""

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph, Frozen, Producer, trace

IMAGE = torch.zeros(1, 3, 7, 7)


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 49, 5),
    )


class Residual(nn.Module):
    """A stem and two blocks, all on one residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.a1, self.n1, self.b1 = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)
        self.a2, self.b2, self.m2 = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.b1(self.n1(self.a1(x)).relu())
        x = x + self.m2(self.b2(self.a2(x).relu()))
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.n1, self.a1, self.b1 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.last, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b1(self.a1(self.n1(x).relu()).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


def slots(graph: ChannelGraph, name: str) -> set[tuple[str, int]]:
    return {(part.tensor, part.dim) for part in graph.groups[name].slices}


def test_chain() -> None:
    graph = trace(chain(), IMAGE)
    assert graph.widths == {"0": 4, "3": 6}
    first, second = graph.groups.values()
    assert first.producers == (Producer("0", ("1",)),)
    assert first.consumers == ("3",)
    assert first.gate_slots == (("1.weight", 0), ("1.bias", 0))
    assert first.copies == (1,)
    assert slots(graph, "0") == {
        *(("0.weight", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0)),
        ("3.weight", 1),
    }
    assert second.producers == (Producer("3", ()),)
    assert second.consumers == ("6",)
    assert second.gate_slots == (("3.weight", 0), ("3.bias", 0))
    assert slots(graph, "3") == {("3.weight", 0), ("3.bias", 0), ("6.weight", 1)}
    channels = torch.tensor([1, 4])
    pixels = [*range(49, 98), *range(4 * 49, 5 * 49)]
    assert second.positions(channels)["6.weight", 1].tolist() == pixels
    assert graph.frozen == [Frozen(("6",), "output of the model")]
    assert graph.operators_without_rule == {}
    # One multiply-add of each weight at every pixel of its output.
    assert graph.uses == {"0.weight": 49, "3.weight": 49, "6.weight": 1}
    assert graph.other_macs == 0


def test_residual_stream_is_one_group_across_blocks() -> None:
    graph = trace(Residual(), IMAGE)
    assert graph.widths == {"stem": 4, "a1": 2, "a2": 3}
    stream = graph.groups["stem"]
    assert stream.producers == (Producer("stem", ("stem_norm",)), Producer("b1", ()), Producer("b2", ("m2",)))
    assert stream.consumers == ("a1", "a2", "head")
    assert set(stream.gate_slots) == {
        *(("stem_norm.weight", 0), ("stem_norm.bias", 0)),
        *(("b1.weight", 0), ("b1.bias", 0)),
        *(("m2.weight", 0), ("m2.bias", 0)),
    }
    one = torch.tensor([2])
    positions = stream.positions(one)
    assert positions.keys() == slots(graph, "stem")
    assert all(where.tolist() == [2] for where in positions.values())


def test_gates_of_a_pre_activation_stream_are_the_normalisations() -> None:
    """A factor on the filters would be divided out by the normalisation that reads them."""
    stream = trace(PreActivation(), IMAGE).groups["stem"]
    assert stream.producers == (Producer("stem", ("n1", "last")), Producer("b1", ("last",)))
    assert stream.consumers == ("a1", "head")
    assert set(stream.gate_slots) == {("n1.weight", 0), ("n1.bias", 0), ("last.weight", 0), ("last.bias", 0)}
    assert stream.residue is None


def test_shared_layer_ties_what_it_reads() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared, self.head = (
                *(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(2, 5)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.shared(self.a(x)) + self.shared(self.b(x))).mean((2, 3)))

    graph = trace(Shared(), IMAGE)
    assert graph.widths == {"a": 4, "shared": 2}
    assert slots(graph, "a") == {("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("shared.weight", 1)}
    assert graph.uses["shared.weight"] == 2 * 49


def test_dead_branch_is_not_touched() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.dead, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.dead(x)
            return self.head(x.mean((2, 3)))

    model = Dead()
    graph = trace(model, IMAGE)
    assert "dead" not in graph.groups
    graph.remove_from(model, {"a": torch.tensor([0, 3])})
    assert model(torch.rand(2, 3, 7, 7)).shape == (2, 5)


def test_groups_of_one_producer_have_distinct_names() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
            self.c, self.d = nn.Conv2d(4, 5, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return (self.c(a) + self.d(torch.cat((a, b), 1))).mean((2, 3))

    assert trace(Parts(), IMAGE).widths == {"a": 4, "b": 2}


def test_ignore_names_layers_and_whole_modules() -> None:
    graph = trace(Residual(), IMAGE, ignore=["a1"])
    assert list(graph.groups) == ["stem", "a2"]
    assert Frozen(("a1",), "named in ignore") in graph.frozen
    assert list(trace(Residual(), IMAGE, ignore=["b1"]).groups) == ["a1", "a2"]
    nested = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
    )
    assert list(trace(nested, IMAGE, ignore=["0"]).groups) == ["1"]


def test_ignore_of_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'stem'"):
        trace(Residual(), IMAGE, ignore=["stemm"])


def test_model_that_cannot_be_captured_is_the_users_error() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="graph='torch-pruning'"):
        trace(Branching(), torch.zeros(1, 3))


def test_tracing_does_not_change_the_model() -> None:
    model = Residual().train()
    model.n1.eval()
    model.a1.weight.requires_grad_(False)
    model(torch.rand(2, 3, 7, 7)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    identities = [id(parameter) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    trace(model, IMAGE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not model.a1.weight.requires_grad


def test_step_is_what_keeps_every_producer_a_multiple() -> None:
    group = trace(chain(), IMAGE).groups["0"]
    assert [group.step(multiple) for multiple in (1, 4, 8)] == [1, 4, 8]


def test_positions_move_along_with_removals() -> None:
    graph = trace(chain(), IMAGE)
    keep = graph.remove({"0": torch.tensor([1]), "3": torch.tensor([0, 2])})
    assert {slot: kept.tolist() for slot, kept in keep.items() if slot[1] == 0 and slot[0].endswith("weight")} == {
        ("0.weight", 0): [0, 2, 3],
        ("1.weight", 0): [0, 2, 3],
        ("3.weight", 0): [1, 3, 4, 5],
    }
    assert keep["3.weight", 1].tolist() == [0, 2, 3]
    assert graph.widths == {"0": 3, "3": 4}
    assert graph.groups["3"].kept.tolist() == [1, 3, 4, 5]
    graph.remove({"3": torch.tensor([1])})
    assert graph.groups["3"].kept.tolist() == [1, 4, 5]
    assert graph.groups["3"].positions(torch.tensor([1]))["6.weight", 1].tolist() == list(range(49, 98))
    assert graph.sizes["6.weight", 1] == 3 * 49
    assert graph.sizes["3.weight", 1] == 3


def test_the_graph_after_removals_is_that_of_the_smaller_network() -> None:
    model = Residual()
    graph = trace(model, IMAGE)
    graph.remove_from(model, {"stem": torch.tensor([0, 2]), "a2": torch.tensor([1])})
    again = trace(copy.deepcopy(model), IMAGE)
    assert again.widths == graph.widths
    assert again.sizes == graph.sizes
    for name, group in graph.groups.items():
        for part, other in zip(group.slices, again.groups[name].slices, strict=True):
            assert (part.tensor, part.dim) == (other.tensor, other.dim)
            assert torch.equal(part.positions, other.positions)
            assert torch.equal(part.channels, other.channels)


def test_freezing_groups_reports_their_producers() -> None:
    graph = trace(chain(), IMAGE).without({"3": "a reason"})
    assert list(graph.groups) == ["0"]
    assert graph.frozen[-1] == Frozen(("3",), "a reason")


def test_a_model_that_cannot_be_captured_is_refused_with_the_cause() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x if x.sum() > 0 else -x)

    with pytest.raises(InputError, match=r"cannot be captured as a graph: .*graph='torch-pruning'"):
        trace(Branching(), torch.ones(1, 4))


def test_a_forward_pass_that_fails_in_training_anyway_freezes_only_what_breaks() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("targets are missing")
            return self.c(self.b(self.a(x).view(-1, 6)))

    graph = trace(Stubborn(), torch.ones(1, 4))
    assert list(graph.groups) == ["b"]
    (frozen,) = [frozen for frozen in graph.frozen if frozen.layers == ("a",)]
    assert frozen.reason.startswith("the forward pass does not follow its widths")


def test_protect_keeps_every_tensor_of_a_module() -> None:
    graph = trace(Residual(), IMAGE, protect=["a1"])
    assert list(graph.groups) == ["a2"]  # the stream's channels are columns of a1's weight
    assert Frozen(("stem", "a1", "b1", "b2"), "named in protect") in graph.frozen


def test_tied_layers_go_together() -> None:
    graph = trace(Residual(), IMAGE, tie=[("stem", "stem")])
    assert graph.widths == {"stem": 4, "a1": 2, "a2": 3}
    twins = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(twins, IMAGE, tie=[("0", "2")])
    assert graph.widths == {"0": 4}
    assert graph.groups["0"].positions(torch.tensor([1])).keys() == {
        *(("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.weight", 1), ("2.bias", 0), ("4.weight", 1)),
    }
    graph.remove_from(twins, {"0": torch.tensor([1, 2])})
    assert twins(torch.rand(1, 3, 7, 7)).shape == (1, 2, 7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": ["stemm"]}, "protect names 'stemm', .* did you mean 'stem'"),
        ({"tie": [("stem", "a3")]}, "tie names 'a3', but the model has no module"),
        ({"tie": [("stem", "a1")]}, "4 and 2 channels"),
        ({"tie": [("stem", "n1")]}, "'n1', which is no layer that makes channels"),
        ({"tie": ["stem", "b1"]}, "must be pairs of layers"),
        ({"attention": "all"}, "attention is 'all', but must be one of 'heads', 'widths', 'keep'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(Residual(), IMAGE, **options)


def test_tied_weights_and_reused_modules_are_cut_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
            self.b.weight = self.a.weight
            self.mix, self.head = nn.Conv2d(6, 6, 1, bias=False), nn.Linear(6, 2)
            self.same = self.mix

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.same(self.mix(self.a(x) + self.b(x))).mean((2, 3)))

    model = Tied()
    graph = trace(model, IMAGE)
    assert graph.widths == {"stem": 4, "a": 6}
    assert slots(graph, "stem") == {("stem.weight", 0), ("stem.bias", 0), ("a.weight", 1)}
    assert slots(graph, "a") == {
        *(("a.weight", 0), ("a.bias", 0), ("b.bias", 0), ("mix.weight", 0), ("mix.weight", 1), ("head.weight", 1)),
    }
    assert graph.uses["a.weight"] == graph.uses["mix.weight"] == 2 * 49
    assert trace(model, IMAGE, ignore=["b"]).widths == trace(model, IMAGE, ignore=["a"]).widths == {"stem": 4}
    assert trace(model, IMAGE, protect=["same"]).widths == {"stem": 4}
    graph.remove_from(model, {"stem": torch.tensor([1]), "a": torch.tensor([0, 5])})
    assert (model.b.in_channels, model.b.out_channels, model.same.in_channels) == (3, 4, 4)
    assert model(torch.rand(2, 3, 7, 7)).shape == (2, 2)
    assert trace(model, IMAGE).widths == {"stem": 3, "a": 4}
