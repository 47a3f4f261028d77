"""What docs/graph.md says is true: its commands exist, its code prunes, its cases are those of the graph."""

import copy
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from compress.graph import ChannelGraph, trace
from compress.graph.custom import CUSTOM_LAYERS, Layer
from compress.graph.rules import RULES
from compress.pruner import Pruner
from compress.removal import SHAPE_UPDATES
from deploy.recipe import PruneSection

PAGE = Path(__file__).parents[2] / "docs" / "graph.md"
TEXT = PAGE.read_text(encoding="utf-8")
OPTIONS, RULE, CUSTOM, UPDATE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)

IMAGE = torch.zeros(2, 3, 6, 6)


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    """What the page's hooks register goes after each test."""
    before: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
        (table, dict(table)) for table in (RULES, CUSTOM_LAYERS, SHAPE_UPDATES)
    ]
    yield
    for table, earlier in before:
        table.clear()
        table.update(earlier)


class Net(nn.Module):
    """`a` makes eight channels, something happens to them, `z` reads them."""

    def __init__(self, middle: nn.Module, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.middle, self.z = nn.Conv2d(3, 8, 1), middle, reader or nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.z(self.middle(self.a(x))).mean((2, 3)))


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def equal_without(model: nn.Module, graph: ChannelGraph, name: str) -> None:
    """The model without the first half of a group's channels computes what it computes with their gates at 0."""
    model = copy.deepcopy(model).double().eval()
    gone = torch.arange(graph.groups[name].width // 2)
    zeroed = copy.deepcopy(model)
    for part in graph.groups[name].gates:
        with torch.no_grad():
            zeroed.get_parameter(part.tensor).index_fill_(part.dim, part.of(gone), 0)
    graph.copy().remove_from(model, {name: gone})
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(images), zeroed(images))


def test_every_command_and_option_exists(invoke: Any) -> None:
    commands = re.findall(r"^espalier (\w+)(.*)$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 3
    for name, rest in commands:
        help_text = invoke(name, "--help").stdout
        for option in re.findall(r"--[\w-]+", rest.partition("#")[0]):
            assert option in help_text
    table = TEXT.partition("## Options")[2].partition("```")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    help_text = invoke("inspect", "--help").stdout
    for option in named:
        assert option in signature(Pruner).parameters
        assert option in PruneSection.model_fields
        assert (f"--{option}" in help_text) == (option != "tie")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert PruneSection(**yaml.safe_load(recipe)["prune"]).embedding


def test_links_and_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
    for file in ("elementwise", "shapes", "norms", "layers"):
        assert (PAGE.parents[1] / "compress" / "graph" / f"{file}.py").exists()


def test_options_in_python() -> None:
    names: dict[str, Any] = {}
    exec(OPTIONS, names)
    groups = names["pruner"].graph.groups
    made = {producer.layer for group in groups.values() for producer in group.producers}
    assert not [layer for layer in made if layer.startswith("layer3")]
    assert "fc" not in {layer for group in groups.values() for layer in group.consumers}
    assert "layer4.0.conv1" in groups
    assert [producer.layer for producer in groups["layer1.0.conv1"].producers] == ["layer1.0.conv1", "layer1.1.conv1"]


def test_a_rule() -> None:
    exec(RULE, {"torch": torch})
    model = Net(Called(torch.ops.mylib.mirror))
    equal_without(model, trace(model, IMAGE), "a")
    del RULES[torch.ops.mylib.mirror.default]
    assert "a" not in trace(model, IMAGE).groups


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = nn.Conv2d(8, 18, 1), DeformConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x))


def test_a_custom_layer() -> None:
    model = Net(Deformed())
    assert "a" not in trace(model, IMAGE).groups
    exec(CUSTOM, {})
    graph = trace(model, IMAGE)
    assert list(graph.groups) == ["a", "middle.conv", "z"]
    for name in ("a", "middle.conv"):
        equal_without(model, graph, name)
    for method in re.findall(r"`(?:layer\.)?(scales|passes|adds|mixes)`", TEXT):
        assert hasattr(Layer, method)


class Tokens(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.attention(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])


def test_an_attention_module_of_ones_own() -> None:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(UPDATE, names)
    model = Net(Tokens(names["MyAttention"](8, 4)))
    graph = trace(model, IMAGE)
    equal_without(model, graph, "middle.attention.qkv")
    del SHAPE_UPDATES[names["MyAttention"]]
    assert "middle.attention.qkv" not in trace(model, IMAGE, ignore=["a"]).groups


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / spread, self.bias)


class ChannelsLast(nn.Module):
    """A normalisation over the channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


CASES = {
    "sigmoid": [nn.Sigmoid(), Called(torch.exp), nn.BatchNorm2d(8, affine=False)],
    "layer norm": [ChannelsLast(nn.LayerNorm(8)), ChannelsLast(nn.RMSNorm(8)), nn.GroupNorm(1, 8)],
    "group norm": [nn.GroupNorm(4, 8)],
    "weight": [
        Standardised(8, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1)),
    ],
    "mean": [Called(lambda x: x * x.mean(1, keepdim=True)), Called(lambda x: x * x.amax(1, keepdim=True))],
    "softmax": [Called(lambda x: x.softmax(1))],
}
"""First word of a row of the page's table -> what it is about."""


def rows() -> dict[str, tuple[str, str]]:
    """First cell -> what Espalier does, what inspect says."""
    table = TEXT.partition("## Where zeroing is not removing")[2].partition("## What is refused")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first: (does, says) for first, does, says in cells[2:]}


@pytest.mark.parametrize(("case", "middle"), [(case, one) for case, several in CASES.items() for one in several])
def test_where_zeroing_is_not_removing(case: str, middle: nn.Module) -> None:
    ((does, says),) = (row for first, row in rows().items() if first.startswith(case))
    model = Net(nn.Identity(), middle) if case == "weight" else Net(middle)
    for embedding in (False, True):
        group = trace(model, IMAGE, embedding=embedding).groups.get("a")
        if "stay" in does and not (embedding and "`embedding` they can go" in does):
            assert group is None
            continue
        assert group is not None
        said = "`mixed by`" if group.mixed else "`reads`" if group.residue else "`exact`"
        assert said == says
        assert ("whole groups" in does) == (group.copies == (2,))


def test_no_row_is_left_out() -> None:
    assert [first.split(",")[0].startswith(case) for case, first in zip(CASES, rows(), strict=True)] == [True] * 6


def test_ordinary_layers_are_exact() -> None:
    for middle in (nn.BatchNorm2d(8), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.MaxPool2d(2)):
        assert trace(Net(middle), IMAGE).groups["a"].exact
