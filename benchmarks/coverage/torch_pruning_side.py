"""The same work done by Torch-Pruning: its graph, its removal, and whether the result is right.

Its pruner takes the same share of every group at random. What is removed is noted as it goes, and the pruned network is
compared with the dense one in which no layer reads a removed channel and every normalisation over channels sees the
others alone: the most lenient reading of what a removal should give.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.coverage import rows
from benchmarks.coverage.building import built, images, own_bytes
from benchmarks.coverage.checks import PARITY, WrongResultError, finite, run
from benchmarks.coverage.meter import Meter
from benchmarks.coverage.removals import ROUND_TO, output_channels
from benchmarks.coverage.rows import Share
from benchmarks.coverage.zeroing import relative_error
from benchmarks.harness.counters import macs, parameters
from compress.graph import ChannelGraph, second_opinion, trace

Gone = dict[tuple[str, str], Tensor]
"""(module, "in" or "out") -> positions that went, of the dense network's."""

_READERS = (nn.modules.conv._ConvNd, nn.Linear)


def theirs(meter: Meter) -> None:
    """Everything that is asked of Torch-Pruning on one model."""
    peer = _Peer(meter)
    if meter.model(peer.prepare) and meter.wanted("removal"):
        for share in meter.row.request.shares:
            meter.share(rows.share_name(share), partial(peer.without, share))
        if any(share.failure is None for share in meter.row.shares.values()):
            meter.aside(peer.compare_groups)


class _Peer:
    model: nn.Module

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.removed: list[Gone] = []
        self.images = images(2, meter.row.request.size, meter.row.request.seed)

    def prepare(self) -> None:
        tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        torch_pruning.DependencyGraph().build_dependency(tiny, torch.zeros(1, 3, 4, 4))
        row, request = self.meter.row, self.meter.row.request
        with self.meter.stage("build"):
            self.model = built(request.model, request.build, request.part, request.seed)
        row.parameters, row.bytes = parameters(self.model), own_bytes(self.model)
        with self.meter.stage("forward"):
            self.dense = run(self.model, self.images)
        row.macs = macs(self.model, self.images[:1])
        if self.meter.wanted("trace"):
            model = copy.deepcopy(self.model)
            with self.meter.stage("trace"):
                self._pruner(model, 0.5)

    def without(self, share: float, into: Share) -> None:
        model = copy.deepcopy(self.model)
        pruner = self._pruner(model, share)
        record = _Record(model)
        with self.meter.stage("removal"):
            for group in pruner.step(interactive=True):
                record.add(group)
                group.prune()
        into.removed = 1 - output_channels(model) / output_channels(self.model)
        self.removed.append(record.gone())
        if self.meter.wanted("parity"):
            with self.meter.stage("parity"):
                into.parity = finite(relative_error(run(model, self.images), self._reference(record)))
            if into.parity > PARITY:
                raise WrongResultError(f"off by {into.parity:.1e} of the largest output")
        if self.meter.wanted("costs"):
            with self.meter.stage("costs"):
                into.macs, into.parameters = macs(model, self.images[:1]), parameters(model)

    def compare_groups(self) -> None:
        """Whether its groups are ours, as sets of slices of parameters."""
        image, row = self.images[:1], self.meter.row
        with self.meter.stage(rows.COMPARISON):
            theirs = as_sets(second_opinion.dependency_groups(self.model, (image,)))
            ours = as_sets(trace(self.model, image, **row.request.trace))
        row.equal_groups = ours == theirs
        row.contained = {group for group in theirs if self._went(group)} <= ours
        if not row.equal_groups:
            row.difference = _difference(ours, theirs)

    def _went(self, group: frozenset[tuple[str, int, frozenset[int]]]) -> bool:
        """Whether channels of the group were removed: it passes over groups that its pruner cannot cut."""
        for tensor, dim, positions in group:
            name = tensor.rpartition(".")[0]
            out_dim = (
                1 if getattr(self.model.get_submodule(name), "transposed", False) and tensor.endswith("weight") else 0
            )
            side = "out" if dim == out_dim else "in"
            if any(positions & set(gone.get((name, side), torch.empty(0)).tolist()) for gone in self.removed):
                return True
        return False

    def _pruner(self, model: nn.Module, share: float) -> Any:
        torch.manual_seed(self.meter.row.request.seed)
        return torch_pruning.pruner.BasePruner(
            model,
            self.images[:1],
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=share,
            round_to=ROUND_TO,
            ignored_layers=output_layers(model, self.images[:1]),
        )

    def _reference(self, record: "_Record") -> list[Tensor]:
        model = copy.deepcopy(self.model)
        for (name, side), gone in record.gone().items():
            module = model.get_submodule(name)
            if side == "in" and isinstance(module, _READERS):
                module.register_forward_pre_hook(partial(_blind, gone=gone))
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.register_forward_hook(partial(_normalised, gone=gone))
        return run(model, self.images)


class _Record:
    """Which channels of which modules go, by their positions in the dense network."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._left: dict[tuple[str, str], Tensor] = {}
        self._widths: dict[tuple[str, str], int] = {}

    def add(self, group: Any) -> None:
        """Take note of a group that is about to be pruned."""
        for dependency, positions in group:
            module = dependency.target.module
            if module not in self._names:
                continue
            pruner = dependency.handler.__self__
            one_sided = pruner.prune_in_channels.__func__ is not pruner.prune_out_channels.__func__
            into = one_sided and dependency.handler.__func__ is pruner.prune_in_channels.__func__
            key = (self._names[module], "in" if into else "out")
            width = (pruner.get_in_channels if into else pruner.get_out_channels)(module)
            left = self._left.setdefault(key, torch.arange(width))
            self._widths.setdefault(key, width)
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[torch.tensor(positions)] = False
            self._left[key] = left[stays]

    def gone(self) -> Gone:
        found = {}
        for key, left in self._left.items():
            gone = torch.ones(self._widths[key], dtype=torch.bool)
            gone[left] = False
            found[key] = gone.nonzero().flatten()
        return found


def _blind(module: nn.Module, inputs: tuple[Tensor, ...], gone: Tensor) -> tuple[Tensor, ...]:
    """The inputs with zeros where channels went."""
    dim = -1 if isinstance(module, nn.Linear) else 1
    return (inputs[0].index_fill(dim, gone, 0), *inputs[1:])


def _normalised(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, gone: Tensor) -> Tensor:
    """What the normalisation makes of the channels that stay, and zeros for the others."""
    weight, bias, images = module.weight, module.bias, inputs[0]
    assert isinstance(weight, Tensor)
    stays = torch.ones(len(weight), dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero().flatten()
    scale, shift = weight[kept], bias[kept] if isinstance(bias, Tensor) else None
    # A layer norm on images (LayerNorm2d of torchvision and timm) has its channels on axis 1, others on the last.
    last = isinstance(module, nn.LayerNorm) and images.shape[-1] == len(weight)
    read = images.index_select(-1 if last else 1, kept)
    assert isinstance(module, nn.GroupNorm | nn.LayerNorm)
    if isinstance(module, nn.GroupNorm):
        made = functional.group_norm(read, module.num_groups, scale, shift, module.eps)
    elif last:
        made = functional.layer_norm(read, (len(kept),), scale, shift, module.eps)
    else:
        made = functional.layer_norm(read.movedim(1, -1), (len(kept),), scale, shift, module.eps).movedim(-1, 1)
    return torch.zeros_like(output).index_copy(-1 if last else 1, kept, made)


def output_layers(model: nn.Module, inputs: Tensor) -> list[nn.Module]:
    """The last layers on every way to an output, whose channels must stay, by autograd's graph."""
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    with torch.enable_grad():
        outputs = torch.utils._pytree.tree_leaves(model.eval()(inputs))
    pending = [one.grad_fn for one in outputs if isinstance(one, Tensor) and one.grad_fn is not None]
    found: dict[nn.Module, None] = {}
    seen = set(pending)
    while pending:
        node = pending.pop()
        following = [source for source, _ in node.next_functions if source is not None]
        weights = [weight for source in following if (weight := _weight(source)) is not None]
        layers = [owners[id(weight)] for weight in weights if id(weight) in owners]
        readers = [layer for layer in layers if isinstance(layer, _READERS)]
        if readers:
            found |= dict.fromkeys(readers)
            continue
        for source in following:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return list(found)


def _weight(node: Any) -> Tensor | None:
    """The parameter behind a node of autograd, also behind its transpose."""
    while not hasattr(node, "variable"):
        if not node.name().startswith(("TBackward", "TransposeBackward", "PermuteBackward")):
            return None
        node = node.next_functions[0][0]
        if node is None:
            return None
    variable: Tensor = node.variable
    return variable


def as_sets(graph: ChannelGraph) -> set[frozenset[tuple[str, int, frozenset[int]]]]:
    """Each group as the positions that it holds along each (tensor, dim)."""
    return {
        frozenset((part.tensor, part.dim, frozenset(part.positions.tolist())) for part in group.slices)
        for group in graph.groups.values()
    }


def _difference(
    ours: set[frozenset[tuple[str, int, frozenset[int]]]], theirs: set[frozenset[tuple[str, int, frozenset[int]]]]
) -> str:
    """How many groups each side has alone, and where the first of them begins."""
    parts = []
    for side, alone in (("only ours", ours - theirs), ("only its own", theirs - ours)):
        if alone:
            tensor, _, _ = min(min((tensor, dim, len(at)) for tensor, dim, at in group) for group in alone)
            parts.append(f"{len(alone)} {side} ({tensor})")
    return ", ".join(parts)
