"""What the process of one model does.

Builds the model, traces it, and for every share of its channels removes them, holds the result to the zeroed network,
trains it for two steps, exports it and runs the file. The row is written after every stage.
"""

import copy
import logging
import warnings
from functools import partial
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.coverage import rows
from benchmarks.coverage.building import OneOutput, built, calibrated, images, own_bytes
from benchmarks.coverage.checks import PARITY, RUNTIME, WrongResultError, finite, run
from benchmarks.coverage.meter import Meter
from benchmarks.coverage.removals import output_channels, random_removals
from benchmarks.coverage.rows import Graph, LeftOut, Request, Row, Share
from benchmarks.coverage.zeroing import relative_error, zeroed
from benchmarks.harness.counters import macs, parameters
from compress.errors import InputError
from compress.graph import ChannelGraph, trace
from deploy.export import export_onnx

BATCHES = (1, 3)
"""That the exported file is run at: neither is the one it was exported with."""

TRAINING_STEPS = 2

_DOUBLE_BYTES = 2**30
"""Models up to this size are compared in double precision."""

_NAMES_KEPT = 8


def work(request: Request, answer: Path) -> None:
    """Do what is asked of one model; the row is in the file `answer` from the first stage on."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(request.threads)
    meter = Meter(Row(request=request), answer)
    if request.side == "torch-pruning":
        from benchmarks.coverage.torch_pruning_side import theirs  # only here: its import is heavy

        theirs(meter)
    else:
        ours(meter)
    meter.done()


def ours(meter: Meter) -> None:
    """Everything that is asked of a model on our own side."""
    subject = Subject(meter)
    if meter.model(subject.prepare) and meter.wanted("removal"):
        for share in meter.row.request.shares:
            meter.share(rows.share_name(share), partial(subject.without, share))


class Subject:
    """One model and its graph."""

    model: nn.Module
    graph: ChannelGraph

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.request = meter.row.request
        self.images = images(2, self.request.size, self.request.seed)

    def prepare(self) -> None:
        """Build, run and trace the model."""
        # What is imported and compiled at the first call belongs to no model.
        trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 4, 4))
        row, request = self.meter.row, self.request
        with self.meter.stage("build"):
            self.model = calibrated(built(request.model, request.build, request.part, request.seed), self.images)
        row.parameters, row.bytes = parameters(self.model), own_bytes(self.model)
        with self.meter.stage("forward"):
            self.dense = run(self.model, self.images)
        row.macs = macs(self.model, self.images[:1])
        if not self.meter.wanted("trace"):
            return
        with self.meter.stage("trace"):
            self.graph = trace(self.model, self.images[:1], **request.trace)
        row.graph = described(self.model, self.graph)
        if not self.graph.groups:
            reasons = ", ".join(f"{left.reason} ({left.first[0]})" for left in row.graph.left_out)
            raise InputError(f"no channel can be removed: {reasons}.")

    def without(self, share: float, into: Share) -> None:
        """Remove a share of the channels from a copy of the model, and see what becomes of it."""
        removals = random_removals(self.graph, share, self.request.seed)
        model = copy.deepcopy(self.model)
        smaller = self.graph.copy()
        with self.meter.stage("removal"):
            smaller.remove_from(model, removals)
        into.removed = 1 - output_channels(model) / output_channels(self.model)
        if self.meter.wanted("parity"):
            with self.meter.stage("parity"):
                self._compare(model, removals, into)
        if self.meter.wanted("costs"):
            with self.meter.stage("costs"):
                into.macs, into.parameters = macs(model, self.images[:1]), parameters(model)
        if self.meter.wanted("training"):
            with self.meter.stage("training"):
                into.losses = trained(model, self.images)
        if self.meter.wanted("export"):
            with TemporaryDirectory() as folder:
                self._deploy(model.eval(), Path(folder) / "model.onnx", into)

    def _compare(self, model: nn.Module, removals: dict[str, Tensor], into: Share) -> None:
        """Hold the model without `removals` to the zeroed one; without the mixed groups where there are any."""
        reference = self._precisely(zeroed(self.model, self.graph, removals))
        error = relative_error(self._precisely(copy.deepcopy(model)), reference)
        into.effect = finite(relative_error(reference, self.dense))
        exact = {name: gone for name, gone in removals.items() if self.graph.groups[name].mixed is None}
        if len(exact) < len(removals):
            into.mixed_parity = finite(error)
            other = copy.deepcopy(self.model)
            self.graph.copy().remove_from(other, exact)
            reference = self._precisely(zeroed(self.model, self.graph, exact))
            error = relative_error(self._precisely(other), reference)
        into.parity = finite(error)
        if error > PARITY:
            raise WrongResultError(f"removal differs from zeroing by {error:.1e} of the largest output")

    def _precisely(self, model: nn.Module) -> Any:
        """What a copy returns in double precision, in which rounding cannot be taken for a wrong removal."""
        if own_bytes(model) > _DOUBLE_BYTES:
            return run(model, self.images)
        try:
            return run(model.double(), self.images.double())
        except RuntimeError:  # it makes tensors of single precision in its forward pass
            return run(model.float(), self.images)

    def _deploy(self, model: nn.Module, file: Path, into: Share) -> None:
        network, size = OneOutput(model).eval(), self.request.size
        with self.meter.stage("export"):
            export_onnx(network, file, image_shape=(3, size, size))
        if not self.meter.wanted("runtime"):
            return
        with self.meter.stage("runtime"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.request.threads
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            for batch in BATCHES:
                inputs = images(batch, size, self.request.seed + batch)
                answer = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
                error = relative_error([torch.from_numpy(one) for one in answer], run(network, inputs))
                into.runtime[str(batch)] = finite(error)
        if max(into.runtime.values()) > RUNTIME:
            raise WrongResultError(f"ONNX Runtime differs from PyTorch by {max(into.runtime.values()):.1e}")


def trained(model: nn.Module, inputs: Tensor) -> tuple[float, ...]:
    """The losses of a few steps of SGD, in training mode, towards class 0 of every output.

    Raises:
        WrongResultError: a loss is not finite.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    model.train()
    for _ in range(TRAINING_STEPS):
        outputs = [one for one in torch.utils._pytree.tree_leaves(model(inputs)) if isinstance(one, Tensor)]
        loss = sum(
            (nn.functional.cross_entropy(one, torch.zeros(one[:, 0].shape, dtype=torch.int64)) for one in outputs),
            start=torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    if not all(map(isfinite, losses)):
        raise WrongResultError(f"the losses of {TRAINING_STEPS} training steps are {losses}")
    return tuple(losses)


def described(model: nn.Module, graph: ChannelGraph) -> Graph:
    """What the row says of the graph."""
    layers: dict[str, list[str]] = {}
    for frozen in graph.frozen:
        layers.setdefault(frozen.reason, []).extend(frozen.layers)
    return Graph(
        groups=len(graph.groups),
        removable=graph.removable,
        channels=output_channels(model),
        left_out=tuple(
            LeftOut(reason=reason, layers=len(set(names)), first=tuple(dict.fromkeys(names))[:_NAMES_KEPT])
            for reason, names in layers.items()
        ),
        operators_without_rule={op: len(nodes) for op, nodes in graph.operators_without_rule.items()},
        residue={name: group.residue for name, group in graph.groups.items() if group.residue is not None},
        mixed={name: group.mixed for name, group in graph.groups.items() if group.mixed is not None},
    )
