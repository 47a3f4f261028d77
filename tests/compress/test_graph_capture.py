"""The recorded graph: the same operators as torch.export's, tensors by name, and what cannot be recorded."""

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph.capture import Capture
from compress.graph.skeleton import Skeleton

IMAGE = torch.zeros(1, 3, 8, 8)


class Everything(nn.Module):
    """Constants made in the forward pass and before it, splits, changes in place, attention, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("scale", torch.ones(8))
        self.shift = torch.ones(8)  # neither parameter nor buffer
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x)).relu_()
        first, second = x.chunk(2, dim=1)
        x = torch.cat((second, first), 1)
        x = x.flatten(2).transpose(1, 2) * self.scale + self.shift
        x = x + torch.arange(8)
        x = self.layer(x + self.attention(x, x, x, need_weights=False)[0])
        return {"logits": self.head(nn.functional.dropout(x.mean(1), 0.1, self.training))}


def operators(program: Any) -> Counter[str]:
    calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    del calls["aten.detach.default"]  # which PyTorch puts behind a constant, or does not
    return calls


def captured(model: nn.Module, *, training: bool = False) -> Capture:
    return Skeleton.of(model, (IMAGE,)).captured(training=training)


@pytest.mark.parametrize("training", [False, True])
def test_operators_are_those_of_torch_export(training: bool) -> None:
    model = Everything().train(training)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.zeros(2, 3, 8, 8),))
    assert operators(captured(model, training=training)) == operators(exported)


def test_tensors_go_by_their_names() -> None:
    model = Everything()
    program = captured(model)
    assert set(program.parameters.values()) == {name for name, _ in model.named_parameters()}
    assert set(program.buffers.values()) == {name for name, _ in model.named_buffers()}
    assert program.live == set(program.parameters.values())
    assert len(program.inputs) == 1
    convolution = next(node for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    assert [program.parameters[node.name] for node in convolution.args[1:3]] == ["stem.weight", "stem.bias"]
    assert convolution.meta["val"].shape == (1, 8, 8, 8)
    halves = [node for node in program.graph.nodes if node.target is operator.getitem and node.args[1] in (0, 1)]
    assert halves[0].meta["val"].shape == (1, 4, 8, 8)


def test_every_value_is_made_before_it_is_read() -> None:
    captured(Everything()).graph.lint()


def test_a_tensor_under_two_names_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight
            self.again = self.b

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.b(self.a(x)))

    program = captured(Tied())
    weights = [n.args[1].name for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert [program.parameters[name] for name in weights] == ["a.weight"] * 3
    assert set(program.parameters.values()) == {"a.weight", "a.bias", "b.bias"}


def test_a_change_in_place_is_what_later_readers_see() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            y.add_(1)
            return y * 2

    calls = [node for node in captured(InPlace()).graph.nodes if node.op == "call_function"]
    assert [str(call.target) for call in calls] == ["aten.relu.default", "aten.add_.Tensor", "aten.mul.Tensor"]
    assert calls[2].args[0] is calls[1]


def test_a_forward_pass_that_decides_by_values_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    message = r"cannot be captured.*depends on the values of a tensor \(aten\._local_scalar_dense\.default in 1\.0\)"
    with pytest.raises(InputError, match=message):
        captured(nn.Sequential(nn.ReLU(), nn.Sequential(Branching())))


def test_an_output_without_visible_tensors_is_refused() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x)

    with pytest.raises(InputError, match="it returns a Output, in which tensors cannot be found"):
        captured(Opaque())


def test_capturing_leaves_modes_as_they_were() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    skeleton = Skeleton.of(Everything().train(), (IMAGE,))
    skeleton.captured(training=True)
    assert not skeleton.model.training
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_attention_counts_with_its_products() -> None:
    """PyTorch's counter does not look into the operator that evaluation mode would run."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 4
    projections, products, hidden = 4 * 8 * 8, 2 * tokens * 8, 2 * 8 * 16
    assert Skeleton.of(layer, (torch.zeros(3, tokens, 8),)).multiply_adds() == tokens * (
        projections + products + hidden
    )
