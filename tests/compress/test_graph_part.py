"""Tracing a part of a model alone: names, what stays, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from compress.budget import Budget
from compress.errors import InputError
from compress.graph import trace
from compress.graph.part import prefixed, trace_part
from compress.pruner import Pruner

IMAGE = torch.zeros(1, 3, 6, 6)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).reshape(x.shape[0], self.width, 6, 6))


class Detector(nn.Module):
    """Its forward pass decides by values; its backbone's does not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(Backbone()), nn.Conv2d(4, 2, 1)

    def forward(self, images: list[Tensor]) -> Tensor:
        features = self.backbone(torch.stack(images))
        return self.head(features[features.amax((1, 2, 3)) > -1e9])


def test_names_are_those_of_the_model() -> None:
    model = Detector()
    graph = trace_part(model, "backbone.0", IMAGE)
    (group,) = graph.groups.values()
    assert (group.name, group.producers[0].layer) == ("backbone.0.a", "backbone.0.a")
    assert group.producers[0].norms == ("backbone.0.norm",)
    assert group.consumers == ("backbone.0.b",)
    assert group.gate_slots == (("backbone.0.norm.weight", 0), ("backbone.0.norm.bias", 0))
    assert {part.tensor for part in group.slices} <= {name for name, _ in model.state_dict().items()}
    assert [str(rule.attribute) for rule in graph.attributes] == ["backbone.0.width"]
    assert graph.attributes[0].follows[0] == "backbone.0.a.weight"
    assert graph.frozen[0].layers == ("backbone.0.b",)
    assert graph.uses == {"backbone.0.a.weight": 36, "backbone.0.b.weight": 36}
    assert set(graph.sizes) == {slot for slot in graph.sizes if slot[0].startswith("backbone.0.")}


def test_prefixing_keeps_everything_else() -> None:
    graph = trace(Backbone(), IMAGE)
    full = prefixed(graph, "part")
    assert list(full.groups) == ["part.a"]
    assert full.widths == {"part.a": 8}
    assert full.other_macs == graph.other_macs
    assert full.remove({"part.a": torch.tensor([1])}).keys() == {
        (f"part.{tensor}", dim) for tensor, dim in graph.remove({"a": torch.tensor([1])})
    }


def test_a_part_is_pruned_inside_its_model() -> None:
    torch.manual_seed(0)
    model = Detector()
    pruner = Pruner(
        model, IMAGE, part="backbone", budget=Budget(channels=0.5), events=1, interval=1, round_to=1, protect=()
    )
    model([torch.rand(3, 6, 6)] * 2).sum().backward()
    pruner.step()
    assert pruner.finished
    assert model.backbone[0].a.weight.shape[0] == model.backbone[0].width == 4
    assert model([torch.rand(3, 6, 6)] * 2).shape == (2, 2, 6, 6)


def test_options_are_in_the_models_names() -> None:
    assert not trace_part(Detector(), "backbone", IMAGE, ignore=["backbone.0.a"]).groups
    assert not trace_part(Detector(), "backbone", IMAGE, protect=["backbone.0.norm"]).groups
    for option in ("ignore", "protect"):
        with pytest.raises(InputError, match=f"{option} names 'head', which does not lie inside the part 'backbone'"):
            trace_part(Detector(), "backbone", IMAGE, **{option: ["head"]})
    with pytest.raises(InputError, match="tie names 'head', which does not lie inside the part"):
        trace_part(Detector(), "backbone", IMAGE, tie=[("backbone.0.a", "head")])


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"part names 'backbon', .* did you mean 'backbone'"):
        trace_part(Detector(), "backbon", IMAGE)


def test_a_part_that_shares_tensors_is_refused() -> None:
    model = Detector()
    model.head.bias = model.backbone[0].b.bias
    with pytest.raises(InputError, match=r"part is 'backbone', but head\.bias outside of it is one of its tensors"):
        trace_part(model, "backbone", IMAGE)


def test_the_second_opinion_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="does not know protect and part"):
        Pruner(Detector(), IMAGE, budget=Budget(macs=0.5), protect=["head"], part="backbone", graph="torch-pruning")
