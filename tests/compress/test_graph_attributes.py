"""Sizes that a forward pass reads from attributes: which are found, that they follow, and that others stay."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.attributes import Attribute, AttributeRule, attributes_set
from compress.errors import WorkError
from compress.graph import trace
from compress.removal import SHAPE_UPDATES, Cuts, keep_slices, shape_update

IMAGE = torch.zeros(1, 3, 6, 6)


class Net(nn.Module):
    """A convolution of 8 channels, something in between, a classifier."""

    def __init__(self, middle: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 1), middle, nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).flatten(2).mean(2))


class Reshaping(nn.Module):
    """torchvision's vision transformer: `x.reshape(n, self.hidden_dim, -1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim, self.conv = 8, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(x.shape[0], self.hidden_dim, -1)


class Splitting(nn.Module):
    """timm's cross-stage networks: `x.split(self.expand_chs // 2, dim=1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.expand_chs = 12
        self.expand, self.join = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.expand(x).split(self.expand_chs // 2, dim=1)
        return self.join(torch.cat((second, first), 1))


class Scaling(nn.Module):
    """timm's pooling networks: a scale viewed in a shape that is kept as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.scale = (8, 1, 1), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Viewing(nn.Module):
    """A module without parameters that follows its neighbours, and a list that another module holds too."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], *self.sizes)


@dataclass
class Config:
    width: int = 8
    depth: int = 8


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.conv = Config(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, self.config.width, 36)


class Features(nn.Module):
    """Two attributes that a forward pass needs together, one of them for two thirds of a stacked projection."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.qk = 8, 16
        self.qkv = nn.Conv2d(8, 24, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 3, self.num_features, 36).unbind(1)
        return q + k + v


CASES = {
    "reshape": (Reshaping, {"middle.hidden_dim": 8}),
    "split": (Splitting, {"middle.expand_chs": 12}),
    "tuple": (Scaling, {"middle.shape[0]": 8}),
    "list": (lambda: Viewing([8, 6, 6]), {"middle.sizes[0]": 8}),
    "config": (Configured, {"middle.config.width": 8}),
    "stacked": (Features, {"middle.num_features": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_attribute_that_is_read_follows(case: str) -> None:
    make, expected = CASES[case]
    torch.manual_seed(0)
    model = Net(make()).eval()
    graph = trace(model, IMAGE)
    assert {str(rule.attribute): rule.attribute.value(model) for rule in graph.attributes} == expected
    assert not [frozen for frozen in graph.frozen if frozen.reason != "output of the model"]
    for _ in range(2):  # a second removal starts from what the first one left
        removals = {name: torch.arange(0, group.width, 3) for name, group in graph.groups.items()}
        graph.remove_from(model, removals)
        assert model(torch.rand(2, 3, 6, 6)).shape == (2, 5)
    assert attributes_set(model) == {
        str(rule.attribute): int(rule.ratio * graph.sizes[rule.follows]) for rule in graph.attributes
    }


def test_an_attribute_that_has_the_size_by_chance_stays() -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window, self.hidden, self.unread = 8, 8, 8
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(functional.adaptive_avg_pool2d(x, self.window))
            return x.reshape(-1, self.hidden, self.window, self.window)

    model = Net(Windowed())
    graph = trace(model, IMAGE)
    assert [str(rule.attribute) for rule in graph.attributes] == ["middle.hidden"]
    graph.remove_from(model, {"middle.conv": torch.arange(5)})
    assert (model.middle.window, model.middle.hidden, model.middle.unread) == (8, 3, 8)
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 5)


def test_layer_norm_by_function_reads_its_shape() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalized_shape = [8]
            self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias)
            return x.permute(0, 3, 1, 2)

    model = Net(Normalising())
    graph = trace(model, IMAGE, embedding=True)
    assert [str(rule.attribute) for rule in graph.attributes] == ["middle.normalized_shape[0]"]
    graph.remove_from(model, {"stem": torch.arange(3)})
    assert model.middle.normalized_shape == [5]
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 5)


def test_a_list_that_two_modules_hold_follows_in_each_for_itself() -> None:
    sizes = [8, 6, 6]
    model = Net(nn.Sequential(Viewing(sizes), nn.Conv2d(8, 8, 1), Viewing(sizes)))
    graph = trace(model, IMAGE)
    assert [str(rule.attribute) for rule in graph.attributes] == ["middle.0.sizes[0]", "middle.2.sizes[0]"]
    removals = {"stem": torch.arange(2), "middle.1": torch.arange(5)}
    graph.remove_from(model, removals)
    assert (model.middle[0].sizes, model.middle[2].sizes, sizes) == ([6, 6, 6], [3, 6, 6], [8, 6, 6])
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 5)


def test_a_size_that_cannot_follow_freezes_what_it_breaks() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = 8
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, self.size, 36)[..., None]).view(-1, 4 + 4, 36)

    model = Net(Mixed())
    graph = trace(model, IMAGE)
    assert list(graph.groups) == ["stem", "middle.a"]
    assert [str(rule.attribute) for rule in graph.attributes] == ["middle.size"]
    (frozen,) = [frozen for frozen in graph.frozen if frozen.layers == ("middle.b",)]
    assert frozen.reason.startswith("the forward pass does not follow its widths")


def test_a_function_that_fails_freezes_its_module_alone() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    @shape_update(Failing)
    def fail(_: nn.Module, cuts: Cuts) -> None:
        if ("conv.weight", 0) in cuts:
            raise ValueError("only powers of two")

    graph = trace(Net(Failing()), IMAGE)
    assert list(graph.groups) == ["stem"]
    (frozen,) = [frozen for frozen in graph.frozen if frozen.layers == ("middle.conv",)]
    assert frozen.reason == "its module does not follow a removal: only powers of two"
    del SHAPE_UPDATES[Failing]


def test_a_size_that_an_attribute_cannot_divide_is_refused_before_anything_changes() -> None:
    model = Net(Reshaping())
    graph = trace(model, IMAGE)
    third = AttributeRule(Attribute("middle", "hidden_dim"), ("middle.conv.weight", 0), Fraction(1, 3))
    keep = graph.keep({"middle.conv": torch.arange(1)})
    with pytest.raises(WorkError, match=r"middle\.hidden_dim must stay 1/3 of dimension 0 .* size 7"):
        keep_slices(model, keep, attributes=[third])
    assert model.middle.conv.weight.shape[0] == 8


@pytest.mark.parametrize(
    "text",
    [
        "middle.missing",
        "middle.conv.weight",
        "middle.training",
        "middle.hidden_dim[0]",
        "middle.hidden_dim.real",
        "__dict__",
        "middle.__doc__",
        "middle._parameters.x",
        "middle.hidden_dim[-1]",
        "",
        "nothing",
    ],
)
def test_only_integers_that_are_there_can_be_named(text: str) -> None:
    assert Attribute.parsed(Net(Reshaping()), text) is None


def test_names_come_back() -> None:
    model = Net(nn.Sequential(Configured(), Viewing([8, 6, 6])))
    for text, value in {"middle.0.config.width": 8, "middle.1.sizes[2]": 6}.items():
        attribute = Attribute.parsed(model, text)
        assert attribute is not None
        assert (str(attribute), attribute.value(model)) == (text, value)
