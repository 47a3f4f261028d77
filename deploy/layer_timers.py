"""Each runtime's way to time its layers, one by one, in inferences of their own."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from compress.errors import InputError, WorkError
from deploy.layer_matching import origins
from deploy.runtimes import Runtime
from deploy.runtimes.onnx_runtime import OnnxRuntime
from deploy.work import onnx_work
from deploy.work_graph import VIEWS, compute_dtype


@dataclass(frozen=True)
class LayerTime:
    """One layer as the runtime executed it."""

    name: str
    """In the runtime's words."""
    kind: str
    """Operator in the runtime's words, such as QLinearConv or ReorderOutput; of a module its class."""
    ms: float
    """Median over the runs; the sum of its launches in one inference."""
    launches: int = 1
    """How often it ran in one inference."""
    origin: tuple[str, ...] = ()
    """Nodes of the ONNX file that it computes, or the module's path; empty where the runtime put it in."""
    bytes: int | None = None
    """Inputs, weights and outputs as the runtime stored them; None where it does not say."""
    dtype: str = ""
    """Type of its first input; empty where the runtime does not say."""

    @property
    def added(self) -> bool:
        """Whether no node of the file is behind it: the runtime put it in, to convert or to move."""
        return not self.origin


class Timer(Protocol):
    """An opened artefact whose layers are timed."""

    def run(self, *, warm_up: int, count: int) -> None:
        """So many inferences that are left out, then so many that count."""
        ...

    def layers(self) -> list[LayerTime]:
        """The layers in the order of execution, each with its median over all that counted; called once."""
        ...


class OnnxTimer:
    def __init__(
        self, runtime: OnnxRuntime, path: Path, device: str, batch: dict[str, np.ndarray], folder: str
    ) -> None:
        if torch.device(device).type != "cpu":
            raise InputError(
                f"The layers of {path.name} cannot be timed on {device}: on GPUs ONNX Runtime's profiler times the "
                "launches and not the kernels; time the layers of a TensorRT engine, or of the checkpoint in PyTorch."
            )
        self._path = path
        self._batch_size = len(next(iter(batch.values())))
        self._profiling = runtime.profiling(batch, Path(folder))
        self._kept: list[bool] = []

    def run(self, *, warm_up: int, count: int) -> None:
        for _ in range(warm_up + count):
            self._profiling.run()
        self._kept += [False] * warm_up + [True] * count

    def layers(self) -> list[LayerTime]:
        events = json.loads(self._profiling.end().read_text(encoding="utf-8"))
        kernels = read_kernels(events, self._kept)
        graph = onnx_work(self._path, self._batch_size).graph
        found = origins([(kernel.name, kernel.kind) for kernel in kernels], graph)
        return [replace(kernel, origin=origin) for kernel, origin in zip(kernels, found, strict=True)]


def read_kernels(events: Sequence[Mapping[str, Any]], kept: Sequence[bool]) -> list[LayerTime]:
    """The kernels in a profile of ONNX Runtime, without their origins.

    Args:
        kept: for each inference in the profile, whether its times count.

    Raises:
        WorkError: the kernels of the inferences are not the same.
    """
    times: dict[tuple[str, str], list[float]] = {}
    about: dict[tuple[str, str], Mapping[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_KERNEL):
            continue
        key = name.removesuffix(_KERNEL), str(event["args"].get("op_name", ""))
        times.setdefault(key, []).append(float(event["dur"]) / 1e3)
        about.setdefault(key, event["args"])
    kernels = []
    for (name, kind), found in times.items():
        launches, rest = divmod(len(found), len(kept))
        if rest:
            raise WorkError(
                f"ONNX Runtime ran {name} {len(found)} times in {len(kept)} inferences on one batch: a network "
                "whose course depends on its data has no layer times."
            )
        sums = [sum(found[run * launches : (run + 1) * launches]) for run, keep in enumerate(kept) if keep]
        facts = about[name, kind]
        sizes = [int(facts[key]) for key in _SIZES if key in facts]
        total = sum(sizes) * launches if len(sizes) == len(_SIZES) else None
        first = next((dtype for tensor in facts.get("input_type_shape", ())[:1] for dtype in tensor), "")
        dtype = compute_dtype({"float": "float32", "double": "float64"}.get(first, first))
        moved = 0 if kind in VIEWS else total
        kernels.append(LayerTime(name, kind, median(sums), launches, bytes=moved, dtype=dtype))
    return kernels


_KERNEL = "_kernel_time"

_SIZES = ("activation_size", "parameter_size", "output_size")


class TensorRtTimer:
    def __init__(self, runtime: Any, batch: dict[str, np.ndarray]) -> None:
        self._runtime = runtime
        self._batch = batch
        self._times: dict[str, list[float]] = {}

    def run(self, *, warm_up: int, count: int) -> None:
        for name, values in self._runtime.profile(self._batch, runs=warm_up + count).items():
            self._times.setdefault(name, []).extend(values[warm_up:])

    def layers(self) -> list[LayerTime]:
        about = {layer.name: layer for layer in self._runtime.layers()}
        found = []
        for name, values in self._times.items():
            layer = about.get(name)
            origin = tuple(dict.fromkeys(_ONNX_LAYER.findall(layer.origin))) if layer else ()
            dtype = layer.inputs[0].dtype if layer and layer.inputs else ""
            kind = layer.kind if layer else ""
            found.append(LayerTime(name, kind, median(values), origin=origin, dtype=compute_dtype(dtype)))
        return found


_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class ModuleClock:
    """Times the leaf modules of a network from just before to just after their forward."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._begun: dict[str, Any] = {}
        self._pending: list[tuple[str, Any, Any]] = []
        self._kinds: dict[str, str] = {}
        self._launches: dict[str, int] = {}
        self._times: dict[str, list[float]] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if not list(module.children()):
                self._kinds[name] = type(module).__name__
                handles.append(module.register_forward_pre_hook(self._before(name)))
                handles.append(module.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_run(self, *, keep: bool) -> None:
        """Sum up the calls of each module in one inference."""
        sums: dict[str, list[float]] = {}
        for name, begin, end in self._pending:
            ms = begin.elapsed_time(end) if self._cuda else (end - begin) / 1e6
            sums.setdefault(name, []).append(ms)
        self._pending.clear()
        if keep:
            for name, calls in sums.items():
                self._times.setdefault(name, []).append(sum(calls))
                self._launches[name] = len(calls)

    def layers(self) -> list[LayerTime]:
        return [
            LayerTime(name, self._kinds[name], median(values), self._launches[name], (name,))
            for name, values in self._times.items()
        ]

    def _before(self, name: str) -> Any:
        def note(*_: object) -> None:
            self._begun[name] = self._now()

        return note

    def _after(self, name: str) -> Any:
        def note(*_: object) -> None:
            self._pending.append((name, self._begun.pop(name), self._now()))

        return note

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class PyTorchTimer:
    def __init__(self, runtime: Runtime, clock: ModuleClock, batch: dict[str, np.ndarray]) -> None:
        self._runtime = runtime
        self._clock = clock
        self._batch = batch

    def run(self, *, warm_up: int, count: int) -> None:
        for number in range(warm_up + count):
            self._runtime.run(self._batch)
            self._clock.end_run(keep=number >= warm_up)

    def layers(self) -> list[LayerTime]:
        return self._clock.layers()
