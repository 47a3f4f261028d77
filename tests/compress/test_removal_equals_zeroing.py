"""The network after physical removal equals the dense one with the removed channels zeroed."""

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_blocks import ODD_BLOCKS
from random_nets import BLOCKS, Spec, build, inputs, randomised, specs
from torch import Tensor, nn

from benchmarks.coverage.zeroing import relative_error, zeroed
from compress.graph import ChannelGraph, trace
from compress.removal import keep_slices, kept_slices

quick = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))


def random_removals(graph: ChannelGraph, seed: int) -> dict[str, Tensor]:
    """Of every group a random subset of 0 to width - 1 channels."""
    generator = torch.Generator().manual_seed(seed)
    removals = {}
    for name, width in graph.widths.items():
        count = int(torch.randint(0, width, (), generator=generator))
        removals[name] = torch.randperm(width, generator=generator)[:count]
    return removals


@quick
@given(spec=specs(), seed=st.integers(0, 2**16))
def test_random_nets(spec: Spec, seed: int) -> None:
    model = build(spec)
    graph = trace(model, inputs(1))
    assert graph.groups
    assert {frozen.reason for frozen in graph.frozen} <= {"output of the model", "all its channels are tied to one"}
    assert not graph.operators_without_rule
    removals = random_removals(graph, seed)
    expected = zeroed(model, graph, removals)(inputs())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    graph.remove_from(model, removals)
    assert relative_error(model(inputs()), expected) < 1e-9
    assert (sum(p.numel() for p in model.parameters()) < parameters) == any(len(gone) for gone in removals.values())


@settings(quick, max_examples=20)
@given(spec=specs((*BLOCKS, *ODD_BLOCKS, *ODD_BLOCKS), max_blocks=10), seed=st.integers(0, 2**16))
def test_random_nets_of_any_block(spec: Spec, seed: int) -> None:
    model = build(spec)
    graph = trace(model, inputs(1))
    assert not graph.operators_without_rule
    removals = random_removals(graph, seed)
    expected = zeroed(model, graph, removals)(inputs())
    graph.remove_from(model, removals)
    assert relative_error(model(inputs()), expected) < 1e-9


# What a block must at least offer to prune: layers by the names that they have in it.
OFFERS = {
    "attention": {"qkv": 4},
    "attention-fused": {"qkv": 4},
    "attention-biased": {"q": 4},
    "attention-channels": {"qkv": 4},
    "attention-talking": {"qkv": 4},
    "attention-rotated": {"q": 4},
    "attention-one-head": {"theta": 8, "g": 8},
    "attention-torch": {"inner": 4, "mlp.0": 8},
    "group-norm": {"body.0": 4},
    "repeated": {"inside": 8},
    "reused": {"first": 8},
    "mixer": {"mlp.0": 8},
    "pixel-shuffle": {"down": 8},
    "normed": {"first": 8, "weighted.parametrizations.weight": 8},
}


@pytest.mark.parametrize("kind", ODD_BLOCKS)
def test_odd_blocks(kind: str) -> None:
    model = build(Spec(8, ((kind, 8),), "mean", seed=0))
    graph = trace(model, inputs(1))
    widths = {name.removeprefix("1."): width for name, width in graph.widths.items()}
    assert widths.items() >= OFFERS[kind].items(), (widths, graph.frozen)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    removals = {name: torch.arange(width // 2) for name, width in graph.widths.items()}
    expected = zeroed(model, graph, removals)(inputs())
    graph.remove_from(model, removals)
    assert relative_error(model(inputs()), expected) < 1e-9
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters


@quick
@given(spec=specs(max_blocks=2), seeds=st.lists(st.integers(0, 2**16), min_size=2, max_size=3))
def test_one_removal_after_another(spec: Spec, seeds: list[int]) -> None:
    model = build(spec)
    graph = trace(model, inputs(1))
    for seed in seeds:
        removals = random_removals(graph, seed)
        expected = zeroed(model, graph, removals)(inputs())
        graph.remove_from(model, removals)
        assert relative_error(model(inputs()), expected) < 1e-9


FAMILIES = {
    "alexnet": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "inception_v3": 96,
    "googlenet": 64,
    "shufflenet_v2_x1_0": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "convnext_tiny": 64,
}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False, "aux_logits": False}}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(torchvision.models.get_model(name, **OPTIONS.get(name, {})).eval())
    images = torch.randn(2, 3, FAMILIES[name], FAMILIES[name])
    graph = trace(model, images[:1])
    assert graph.groups
    generator = torch.Generator().manual_seed(0)
    removals = {
        name: torch.randperm(width, generator=generator)[: min(width - 1, max(1, round(0.4 * width)))]
        for name, width in graph.widths.items()
    }
    with torch.no_grad():
        expected = zeroed(model, graph, removals)(images)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        graph.remove_from(model, removals)
        assert relative_error(model(images), expected) < 1e-5
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters


RESIDUAL = Spec(8, (("residual", 4), ("depthwise", 8), ("layer-scale", 8), ("grouped", 8)), "flatten", seed=1)


def test_residual_group_keeps_the_same_indices_everywhere() -> None:
    model = build(RESIDUAL)
    graph = trace(model, inputs(1))
    stream = graph.groups["0.0.0"]
    makers = [producer.layer for producer in stream.producers]
    assert makers == ["0.0.0", "1.second.0", "2.project.0", "3.body.2"]
    assert stream.consumers == ("1.first.0", "2.expand.0", "3.body.0.0", "4.reduce.0")
    gone = torch.tensor([0, 5, 6])
    graph.remove_from(model, {"0.0.0": gone})
    kept = kept_slices(model)
    reads = {(f"{layer}.weight", 1) for layer in stream.consumers}
    makes = {(f"{layer}.weight", 0) for layer in makers}
    assert reads | makes | {("3.scale", 0)} <= set(kept)
    assert {tuple(positions.tolist()) for positions in kept.values()} == {(1, 2, 3, 4, 7)}


def test_grouped_convolution_with_one_input_left_per_group_keeps_its_groups() -> None:
    """Its shape is then that of a depthwise convolution, which would lose groups."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 1)).double()
    graph = trace(model, inputs(1))
    assert graph.widths == {"0": 2, "1": 2}
    for name in ("0", "1"):
        removals = {name: torch.tensor([1])}
        expected = zeroed(model, graph, removals)(inputs())
        graph.remove_from(model, removals)
        assert relative_error(model(inputs()), expected) < 1e-9
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (4, 4, 4)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_optimizer_state_are_cut_alike(name: str) -> None:
    model = build(RESIDUAL).train()
    optimizer = OPTIMIZERS[name](model.parameters())
    model(inputs()).square().sum().backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    before = {
        key: {"value": parameter.detach().clone(), "gradient": parameter.grad.clone()}
        | {state: value.clone() for state, value in optimizer.state[parameter].items()}
        for key, parameter in parameters.items()
    }
    graph = trace(model, inputs(1))
    keep = graph.remove(random_removals(graph, 3))
    keep_slices(model, keep, optimizer)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    compared = 0
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key]
        after = {"value": parameter.detach(), "gradient": parameter.grad, **optimizer.state[parameter]}
        assert after.keys() == before[key].keys()
        for state, value in before[key].items():
            expected = value
            if value.dim():  # Adam's step count is a scalar
                for dim in range(value.dim()):
                    if (key, dim) in keep:
                        expected = expected.index_select(dim, keep[key, dim])
            assert torch.equal(after[state], expected), (key, state)
            compared += value.shape != expected.shape
    assert compared > 20
    optimizer.zero_grad()
    loss = model(inputs()).square().sum()
    loss.backward()
    optimizer.step()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    assert model(inputs()).square().sum() != loss
