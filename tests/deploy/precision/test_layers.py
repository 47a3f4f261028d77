import onnx
import pytest
import torch
from torch import nn

from compress.errors import InputError
from deploy.export import export_onnx
from deploy.onnx_file import read_onnx
from deploy.precision.layers import layer_names, match_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.bn1(self.conv1(x))))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    path = export_onnx(model, tmp_path_factory.mktemp("layers") / "net.onnx", image_shape=(4, 8, 8))
    return read_onnx(path)


def operators(graph: onnx.ModelProto, *patterns: str) -> list[str]:
    matched = match_layers(graph, patterns)
    return [node.op_type for node in graph.graph.node if node.name in matched]


def test_node_goes_by_its_module_by_the_normalisation_folded_into_it_and_by_the_modules_around(
    graph: onnx.ModelProto,
) -> None:
    convolution = next(node for node in graph.graph.node if node.op_type == "Conv")
    assert layer_names(graph)[convolution.name] == ("0.conv1", "0.bn1", "0", convolution.name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("0.conv2", ["Conv"]),
        ("0.conv?", ["Conv", "Conv"]),
        ("0.bn1", ["Conv"]),
        ("0", ["Conv", "Relu", "Conv", "Add"]),
        ("3", ["Gemm"]),
    ],
)
def test_layers_are_found_by_module_block_and_pattern(
    graph: onnx.ModelProto, pattern: str, expected: list[str]
) -> None:
    assert operators(graph, pattern) == expected


def test_layer_is_found_by_the_name_of_its_node(graph: onnx.ModelProto) -> None:
    name = graph.graph.node[0].name
    assert match_layers(graph, [name]) == {name}
    assert match_layers(graph, []) == set()


def test_name_of_no_layer_is_refused_with_the_nearest_ones(graph: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=r'"0\.conv3"; did you mean 0\.conv[12]'):
        match_layers(graph, ["0.conv1", "0.conv3"])
    with pytest.raises(InputError, match=r'"zzzzzz"; there are 0, 0\.bn1, .* and \d+ more\.'):
        match_layers(graph, ["zzzzzz"])


@pytest.mark.parametrize("scopes", ["not a list", "['', 'a'", "3", None])
def test_file_of_another_exporter_has_its_nodes_names_only(scopes: str | None) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="/relu")
    if scopes is not None:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model = onnx.ModelProto(graph=onnx.GraphProto(node=[node]))
    assert layer_names(model) == {"/relu": ("/relu",)}
