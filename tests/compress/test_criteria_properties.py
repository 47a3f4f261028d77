"""What must always hold of criteria, on random networks."""

from collections.abc import Callable

import pytest
import torch
from gates_by_hand import CLOSE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import Spec, specs
from random_nets import build as random_net
from random_nets import inputs as random_images
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import InputError
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, build, criteria

few = settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))

KINDS = ("chain", "plain", "residual", "projection", "dense", "branches", "depthwise", "squeeze-excite", "sigmoid")


def of_random_net(spec: Spec) -> tuple[nn.Module, ChannelGraph, Callable[[list[int]], Minibatch]]:
    model = random_net(spec)
    graph = trace(model, random_images())
    images, labels = random_images(6, 1), torch.tensor([0, 1, 2, 3, 4, 0])

    def of(order: list[int]) -> Minibatch:
        return Minibatch((images[order],), lambda output: F.cross_entropy(output, labels[order]))

    return model, graph, of


def after_one(text: str, model: nn.Module, graph: ChannelGraph, one: Minibatch) -> dict[str, Tensor]:
    importance = build(text, model, graph)
    model.zero_grad()
    one.loss(model(*one.inputs)).backward()
    importance.observe(one)
    importance.close()
    return importance.scores()


def applicable(names: list[str], model: nn.Module, graph: ChannelGraph) -> list[str]:
    found = []
    for name in names:
        try:
            build(name, model, graph).close()
        except InputError:
            continue
        found.append(name)
    return found


@few
@given(spec=specs(KINDS, max_blocks=2), order=st.permutations(range(6)))
def test_scores_are_finite_unsigned_and_do_not_depend_on_the_order_of_the_images(spec: Spec, order: list[int]) -> None:
    model, graph, of = of_random_net(spec)
    cheap = [name for name in criteria() if name not in ("oracle", "taylor-so", "obd")]
    names = applicable(cheap, model, graph)
    assert {"taylor", "magnitude", "random", "taylor-so-full", "hessian"} <= set(names)
    for name in names:
        scores = after_one(name, model, graph, of(list(range(6))))
        permuted = after_one(name, model, graph, of(order))
        for group, values in scores.items():
            assert bool(torch.isfinite(values).all())
            assert bool((values >= 0).all())
            torch.testing.assert_close(permuted[group], values, rtol=1e-8, atol=1e-18)


@settings(few, max_examples=2)
@given(spec=specs(KINDS, max_blocks=1), order=st.permutations(range(6)))
def test_ablations_and_curvatures_do_not_depend_on_the_order_of_the_images(spec: Spec, order: list[int]) -> None:
    model, graph, of = of_random_net(spec)
    for name in ("oracle", "obd"):
        importance = build(f"{name}:momentum=0", model, graph)
        importance.observe(of(list(range(6))))
        scores = importance.scores()
        importance.observe(of(order))
        permuted = importance.scores()
        for group, values in scores.items():
            assert bool(torch.isfinite(values).all())
            assert name == "obd" or bool((values >= 0).all())
            torch.testing.assert_close(permuted[group], values, rtol=1e-6, atol=1e-14)


@few
@given(spec=specs(tuple(kind for kind in KINDS if kind != "plain"), max_blocks=2), training=st.booleans())
def test_of_a_single_image_taylor_and_taylor_fg_are_the_same(spec: Spec, training: bool) -> None:
    model, graph, of = of_random_net(spec)
    model.train(training and spec.head != "two-layers")  # that one draws dropout anew for each criterion
    single = of([3])
    for combine in ("joint", "mean", "max"):
        names = [f"taylor:combine={combine}", f"taylor-fg:combine={combine}"]
        scores, full = (after_one(name, model, graph, single) for name in names)
        for group, values in scores.items():
            torch.testing.assert_close(full[group], values, rtol=1e-8, atol=1e-18)


@settings(few, max_examples=4)
@given(spec=specs(tuple(kind for kind in KINDS if kind != "sigmoid"), max_blocks=2), seed=st.integers(0, 2**16))
def test_a_channel_whose_gates_are_0_has_no_importance(spec: Spec, seed: int) -> None:
    model, graph, of = of_random_net(spec)
    generator = torch.Generator().manual_seed(seed)
    closed = {name: int(torch.randint(width, (), generator=generator)) for name, width in graph.widths.items()}
    parameters = dict(model.named_parameters())
    for name, channel in closed.items():
        for slot, positions in graph.groups[name].positions(torch.tensor([channel])).items():
            if slot in graph.groups[name].gate_slots:
                parameters[slot[0]].data.index_fill_(slot[1], positions, 0)
    for name in applicable(["taylor", "taylor:combine=max", "taylor-fg", "taylor-output", "oracle"], model, graph):
        scores = after_one(name, model, graph, of(list(range(6))))
        for group, channel in closed.items():
            assert float(scores[group][channel]) < 1e-24, (name, group)


@few
@given(spec=specs(KINDS, max_blocks=2))
def test_all_rules_agree_in_a_group_with_one_gate(spec: Spec) -> None:
    model, graph, of = of_random_net(spec)
    one = of(list(range(6)))
    for name in applicable(["taylor", "taylor-fg", "taylor-output:normalise=false"], model, graph):
        joint, mean, largest = (
            after_one(f"{name}:combine={how}", model, graph, one) for how in ("joint", "mean", "max")
        )
        for group in graph.groups.values():
            if len({slot[0].rpartition(".")[0] for slot in group.gate_slots}) == 1:
                torch.testing.assert_close(mean[group.name], joint[group.name], **CLOSE)
                torch.testing.assert_close(largest[group.name], joint[group.name], **CLOSE)
    for name in ("magnitude", "taylor-weight", "hessian"):
        joint, mean, largest = (
            after_one(f"{name}:combine={how}", model, graph, one) for how in ("joint", "mean", "max")
        )
        for group in graph.groups.values():
            if len(group.filters) == 1:
                torch.testing.assert_close(mean[group.name], joint[group.name], **CLOSE)
                torch.testing.assert_close(largest[group.name], joint[group.name], **CLOSE)


class WithAuxiliaryHead(nn.Module):
    """As Inception has one: a second classifier that runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.extra, self.extra_norm = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        self.extra_head, self.head = nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.body(x)))
        logits = self.head(x.mean((2, 3)))
        if self.training:
            logits = logits + self.extra_head(torch.relu(self.extra_norm(self.extra(x))).mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", criteria())
def test_an_auxiliary_head_can_be_scored(name: str) -> None:
    torch.manual_seed(0)
    model = WithAuxiliaryHead().train()
    images, labels = torch.randn(6, 2, 8, 8), torch.arange(6) % 3
    graph = trace(model, images)
    assert set(graph.groups) == {"body", "extra"}
    importance = build(name, model, graph)
    F.cross_entropy(model(images), labels).backward()
    importance.observe(Minibatch((images,), lambda logits: F.cross_entropy(logits, labels)))
    assert all(torch.isfinite(values).all() for values in importance.scores().values())
