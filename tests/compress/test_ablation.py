"""Losses of ablated networks, run in parts, against copies whose parameters are 0 and finite differences."""

import copy
import logging
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import Spec, conv_norm, randomised, specs
from random_nets import build as random_net
from test_removal_equals_zeroing import zeroed
from torch import Tensor, nn
from torch.nn import functional as F

from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, ablation
from compress.importance.ablation import AblatedMinibatch, Ablation
from compress.models import build

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 4)
    )


def spec(*blocks: tuple[str, int], head: str = "mean") -> Callable[[], nn.Module]:
    return lambda: random_net(Spec(8, blocks, head, seed=1))


class Tokens(nn.Module):
    """Linear layers on several positions, and a bias where no convolution has one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, 6, 4, stride=4, bias=False), nn.Linear(6, 5)
        self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.second(F.gelu(self.first(x)))).mean(1))


class UsedTwice(nn.Module):
    """A layer that runs twice, the second time on what it made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 6, 3), conv_norm(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.first(x).relu()).relu()).relu().mean((2, 3)))


def without_affine() -> nn.Module:
    """Normalisation without scale and shift: the gate is the convolution, which comes before it."""
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


# name -> (factory, height and width of the images)
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: build("espalier:resnet20"), 8),
    "lenet3": (lambda: build("espalier:lenet3", image_size=16), 16),
    "mlp": (mlp, 2),
    "tokens": (Tokens, 8),
    "depthwise and squeeze-excite": (spec(("depthwise", 8), ("squeeze-excite", 4), ("depth-multiplier", 8)), 8),
    "concatenation": (spec(("dense", 4), ("dense", 4), ("branches", 8)), 8),
    "grouped": (spec(("grouped", 8), ("grouped-shuffle", 8), head="flatten"), 8),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), 32),
    "pre-activation": (spec(("pre-activation", 4), ("pre-activation", 8)), 8),
    "a layer twice": (UsedTwice, 8),
    "residue": (spec(("sigmoid", 4), ("unit", 4), ("plain", 4)), 8),
}


def batch(images: int, size: int, seed: int = 0) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(images, 3, size, size, generator=generator, dtype=torch.double)
    labels = torch.randint(4, (images,), generator=generator)
    return Minibatch((pictures,), lambda output: F.cross_entropy(output, labels))


def prepared(factory: Callable[[], nn.Module], size: int) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = randomised(factory().double().eval())
    return model, trace(model, batch(2, size).inputs)


def loss_of_copy(model: nn.Module, graph: ChannelGraph, removals: dict[str, Tensor], one: Minibatch) -> float:
    with torch.no_grad():
        return float(one.loss(zeroed(model, graph, removals)(*one.inputs)))


def removals_of(masks: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: (mask[index] == 0).nonzero().flatten() for name, mask in masks.items()}


def assert_losses(state: AblatedMinibatch, masks: Mapping[str, Tensor], one: Minibatch) -> None:
    model, graph = state._ablation.model, state._ablation.graph
    count = len(next(iter(masks.values())))
    slow = [loss_of_copy(model, graph, removals_of(masks, index), one) for index in range(count)]
    expected = torch.tensor(slow, dtype=torch.double)
    losses = state.losses(masks)
    assert losses.dtype == torch.float64
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected, **CLOSE)
    torch.testing.assert_close(state.losses_by_whole_passes(masks), expected, **CLOSE)


def some_singles(width: int, count: int) -> Tensor:
    chosen = torch.linspace(0, width - 1, min(count, width)).long()
    return 1 - F.one_hot(chosen, width).double()


def subsets(width: int, count: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, width, generator=generator) > torch.rand(count, 1, generator=generator)).double()


def masks_of_many(graph: ChannelGraph, names: list[str], count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: subsets(graph.widths[name], count, generator) for name in names}


@pytest.mark.parametrize("name", NETS)
def test_losses_are_those_of_copies_whose_channels_are_zero(name: str) -> None:
    factory, size = NETS[name]
    model, graph = prepared(factory, size)
    made = Ablation(model, graph, batch(4, size))
    residues = {group.name for group in graph.groups.values() if group.residue is not None}
    assert set(made.whole) == residues
    assert bool(residues) == (name == "residue")
    one = batch(3, size, seed=1)
    state = made.on(one)
    assert state.images == 3
    assert state.loss == pytest.approx(loss_of_copy(model, graph, {}, one), rel=1e-9)
    few = 1 if name in ("shufflenet", "resnet20") else 2
    generator = torch.Generator().manual_seed(1)
    names = list(graph.groups)
    for group in names[:: 8 if name == "shufflenet" else 1]:
        width = graph.widths[group]
        assert_losses(state, {group: torch.cat([some_singles(width, few), subsets(width, 1, generator)])}, one)
    assert_losses(state, masks_of_many(graph, names, 2), one)
    assert_losses(state, masks_of_many(graph, names[1:3] or names, 3), one)
    assert_losses(state, masks_of_many(graph, names[:0:-2] or names, 2), one)


quick = settings(deadline=None, max_examples=6, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(spec=specs(max_blocks=2), seed=st.integers(0, 2**16), images=st.integers(1, 5))
def test_random_nets(spec: Spec, seed: int, images: int) -> None:
    model = random_net(spec)
    graph = trace(model, batch(2, 8).inputs)
    one = Minibatch(batch(images, 8, seed).inputs, lambda output: output.square().mean())
    state = Ablation(model, graph, Minibatch(batch(2, 8).inputs, one.loss)).on(one)
    for group, width in graph.widths.items():
        assert_losses(state, {group: some_singles(width, 2)}, one)
    assert_losses(state, masks_of_many(graph, list(graph.groups), 2, seed), one)


def test_a_channel_that_is_zero_is_a_channel_that_is_removed() -> None:
    factory, size = NETS["residue"]
    model, graph = prepared(factory, size)
    one = batch(4, size)
    state = Ablation(model, graph, one).on(one)
    for name, width in graph.widths.items():
        masks = 1 - torch.eye(width, dtype=torch.double)[:2]
        losses = state.losses({name: masks})
        for channel, loss in enumerate(losses.tolist()):
            pruned = copy.deepcopy(model)
            graph.copy().remove_from(pruned, {name: torch.tensor([channel])})
            with torch.no_grad():
                assert loss == pytest.approx(float(one.loss(pruned(*one.inputs))), rel=1e-9)


def test_a_normalisation_without_scale_and_shift_is_no_place_for_a_gate() -> None:
    model, graph = prepared(without_affine, 8)
    one = batch(3, 8)
    state = Ablation(model, graph, one).on(one)
    for name, width in graph.widths.items():
        assert_losses(state, {name: some_singles(width, 3)}, one)
        for channel in range(width):
            pruned = copy.deepcopy(model)
            graph.copy().remove_from(pruned, {name: torch.tensor([channel])})
            with torch.no_grad():
                expected = float(one.loss(pruned(*one.inputs)))
            mask = 1 - F.one_hot(torch.tensor([channel]), width).double()
            assert float(state.losses({name: mask})) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("first", [2, 5])
def test_minibatches_of_any_size_fit_one_ablation(first: int) -> None:
    factory, size = NETS["grouped"]
    model, graph = prepared(factory, size)
    made = Ablation(model, graph, batch(first, size))
    assert not made.whole
    for images in (1, 2, 3, 7):
        one = batch(images, size, seed=images)
        assert_losses(made.on(one), masks_of_many(graph, list(graph.groups), 3), one)


@pytest.mark.parametrize("copies", [1, 3, 100])
def test_ablations_are_computed_so_many_at_a_time_as_fit(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = prepared(spec(("residual", 4), ("dense", 4)), 8)
    one = batch(3, 8)
    state = Ablation(model, graph, one).on(one)
    largest = state._ablation._forward.bytes_per_image(state._suffix(("0.0.0",)))
    assert largest == 12 * 8 * 8 * 8  # of the concatenation, 12 channels of 8 x 8 in double precision
    monkeypatch.setattr(ablation, "_WORKING_SET", {"cpu": copies * 3 * largest})
    assert state.copies(("0.0.0",)) == copies
    done: list[int] = []
    masks = masks_of_many(graph, ["0.0.0"], 7)
    losses = state.losses(masks, done=done.append)
    assert done == [min(copies, 7 - start) for start in range(0, 7, copies)]
    torch.testing.assert_close(losses, state.losses_by_whole_passes(masks), **CLOSE)
    monkeypatch.setattr(ablation, "_WORKING_SET", {"cpu": 1})
    assert state.copies(("0.0.0",)) == 1
    done.clear()
    state.losses_by_whole_passes(masks, done=done.append)
    assert done == [1] * 7


class SeveralInputs(nn.Module):
    """Two inputs, and outputs of which one does not depend on every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_norm(3, 4), nn.Linear(5, 4)
        self.left_head, self.both_head = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, features: Tensor) -> dict[str, object]:
        left, right = self.left(x).relu().mean((2, 3)), self.right(features).relu()
        return {"left": self.left_head(left), "both": [self.both_head(torch.cat([left, right], 1))]}


def test_inputs_and_outputs_may_be_several() -> None:
    torch.manual_seed(0)
    model = randomised(SeveralInputs().double().eval())
    labels = torch.arange(3)

    def loss(output: dict) -> Tensor:
        return F.cross_entropy(output["left"], labels) + 2 * F.cross_entropy(output["both"][0], labels)

    one = Minibatch((*batch(3, 8).inputs, torch.randn(3, 5, dtype=torch.double)), loss)
    graph = trace(model, one.inputs)
    made = Ablation(model, graph, one)
    assert made.whole == []
    for names in (["left.0"], ["right"], ["left.0", "right"]):
        assert_losses(made.on(one), masks_of_many(graph, names, 4), one)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_norm(3, 5), nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(self.body(x).relu(), 2).view(4, -1))


class MixedImages(nn.Module):
    """What one image gives depends on the others, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.second(x - x.mean(0, keepdim=True)).relu().mean((2, 3)))


class Similarities(nn.Module):
    """Compares every image with every other, so that images are counted along two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.left_out = nn.Linear(12, 5), nn.Linear(5, 3)
        self.right, self.right_out = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :2, :2].flatten(1)
        return self.left_out(self.left(x).relu()) @ self.right_out(self.right(x).relu()).T


def statistics_of_the_batch() -> nn.Module:
    """Batch normalisation that keeps no running statistics normalises by the batch in evaluation mode too."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


class Branching(nn.Module):
    """Branches by its values, once `outside` is set: nothing that an export could follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 5), nn.Linear(5, 4)
        self.outside = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        if self.outside and float(x.detach().sum()) > -1:
            x = x * 2
        return self.head(x)


def test_a_forward_pass_that_fixes_the_batch_size_takes_whole_passes(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = randomised(FixedBatch().double().eval())
    one = batch(4, 8)
    graph = trace(model, one.inputs)
    with caplog.at_level(logging.WARNING, logger="compress"):
        made = Ablation(model, graph, one)
    (record,) = [record for record in caplog.records if record.name.startswith("compress")]
    assert "every ablation takes a whole forward pass" in record.getMessage()
    assert made.whole == ["body.0"]
    state = made.on(one)
    assert state.copies(("body.0",)) == 1
    assert state.loss == pytest.approx(loss_of_copy(model, graph, {}, one))
    assert_losses(state, {"body.0": 1 - torch.eye(5, dtype=torch.double)}, one)


def test_a_forward_pass_that_cannot_be_exported_takes_whole_passes(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Branching().double().eval()
    one = batch(3, 2)
    graph = trace(model, one.inputs)
    model.outside = True
    made = Ablation(model, graph, one)
    assert "torch.export cannot capture it" in caplog.text
    assert_losses(made.on(one), {"first": 1 - torch.eye(5, dtype=torch.double)}, one)


def test_a_single_image_to_begin_with_takes_whole_passes_with_the_right_numbers() -> None:
    model, graph = prepared(mlp, 2)
    made, one = Ablation(model, graph, batch(1, 2)), batch(3, 2)
    assert_losses(made.on(one), masks_of_many(graph, list(graph.groups), 3), one)


@pytest.mark.parametrize("factory", [MixedImages, Similarities, statistics_of_the_batch])
def test_networks_whose_images_depend_on_each_other_have_the_right_losses(factory: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, one = factory().double().eval(), batch(4, 8)
    graph = trace(model, one.inputs)
    state = Ablation(model, graph, one).on(one)
    for name, width in graph.widths.items():
        assert_losses(state, {name: 1 - torch.eye(width, dtype=torch.double)}, one)


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole passes"])
@pytest.mark.parametrize("blocks", [(("residual", 4),), (("depthwise", 4), ("squeeze-excite", 4)), (("dense", 4),)])
def test_derivatives_by_the_masks_are_finite_differences(blocks: tuple[tuple[str, int], ...], parts: bool) -> None:
    model, graph = prepared(lambda: random_net(Spec(4, blocks, "mean", seed=3)), 8)
    one = batch(2, 8)
    state = Ablation(model, graph, one).on(one)
    names = list(graph.groups)[:2]
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, graph.widths[name], generator=generator, dtype=torch.double) + 0.5 for name in names]
    masks = [mask.requires_grad_() for mask in masks]

    def losses(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return state.losses(given) if parts else state.losses_by_whole_passes(given)

    assert torch.autograd.gradcheck(losses, masks, eps=1e-6, atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradgradcheck(losses, masks, eps=1e-6, atol=1e-7, rtol=1e-4)


def test_second_derivatives_by_hand() -> None:
    """E = (Σ_c z_c w_c v_c x)²: its Hessian by the gates is 2 a aᵀ with a_c = w_c v_c x."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    model[0].weight.data = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.double)
    model[1].weight.data = torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.double)
    one = Minibatch((torch.ones(2, 1, dtype=torch.double),), lambda output: output.square().mean())
    graph = trace(model, one.inputs)
    state = Ablation(model, graph, one).on(one)
    slopes = torch.tensor([3.0, 2.0, -0.5], dtype=torch.double)
    assert state.loss == pytest.approx(4.5**2)
    torch.testing.assert_close(
        state.losses({"0": 1 - torch.eye(3, dtype=torch.double)}), (4.5 - slopes).square(), **CLOSE
    )
    hessian = torch.autograd.functional.hessian(lambda z: state.losses({"0": z[None]})[0], torch.ones(3).double())
    torch.testing.assert_close(hessian, 2 * slopes.outer(slopes), **CLOSE)


# --- the model stays as it is ---------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model, graph = prepared(spec(("residual", 4), ("sigmoid", 4)), 8)
    one = batch(4, 8)
    model.train()
    model.get_submodule("1.first").eval()
    model.get_submodule("0.0.0").weight.requires_grad_(False)
    one.loss(model(*one.inputs)).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = Ablation(model, graph, one).on(one)
    for name in graph.groups:
        masks = masks_of_many(graph, [name], 3)
        state.losses(masks)
        losses = state.losses({name: masks[name].requires_grad_()})
        torch.autograd.grad(losses.sum(), masks[name])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "0.0.0.weight")
        assert parameter.grad is gradients[name] is None or torch.equal(parameter.grad, gradients[name])
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_weights_and_statistics_that_changed_between_two_minibatches_are_seen() -> None:
    model, graph = prepared(spec(("residual", 4), ("dense", 4)), 8)
    one = batch(4, 8)
    made = Ablation(model, graph, one)
    masks = masks_of_many(graph, list(graph.groups), 3)
    found = []
    for step in range(3):
        state = made.on(one)
        assert_losses(state, masks, one)
        found.append(state.loss)
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
        model.train()
        model(*one.inputs)  # moves the running statistics
        model.eval()
    assert all(abs(one - other) > 1e-3 for one, other in pairwise(found))


def test_images_may_be_laid_out_in_any_way() -> None:
    model, graph = prepared(spec(("grouped", 8), ("split-shuffle", 4)), 8)
    one = batch(3, 8)
    made = Ablation(model, graph, one)
    masks = masks_of_many(graph, list(graph.groups), 3)
    expected = made.on(one).losses(masks)
    odd = one.inputs[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(made.on(Minibatch((odd,), one.loss)).losses(masks), expected, **CLOSE)
