"""The networks of the suite: one dense, others pruned to half its multiply-adds, as checkpoints and as ONNX files.

Weights and images are random: latency does not depend on them, and accuracy is measured elsewhere. Batch normalisation
takes its statistics from the images, so that activations stay in the range of fp16 as those of trained networks do.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks.alignment import build, pruned
from benchmarks.gpu_suite.groups import Precision
from benchmarks.harness.counters import macs, parameters
from benchmarks.harness.processes import call
from benchmarks.harness.results import Artefact
from compress import checkpoint
from compress.errors import MissingExtraError, first_line
from compress.files import sha256
from deploy import onnx_file
from deploy.export import BATCH, export_onnx
from deploy.precision.half import to_half
from deploy.runtimes.pytorch import INPUT_NAME, OUTPUT_NAME, evaluating

IMAGES = 8
"""For the gradients of the one pruning event, and for batch normalisation."""

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Family:
    """What all networks of a suite have in common."""

    factory: str = "torchvision:resnet50"
    side: int = 224
    """Of the images, in pixels."""
    macs_kept: float = 0.5
    """Of the pruned ones."""
    round_to: tuple[int, ...] = (1, 8, 16, 32)
    """One pruned network for each: its widths are multiples of this."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.side, self.side)

    def names(self) -> dict[str, int | None]:
        """Network -> its multiple; None for the dense one, which comes first."""
        return {"dense": None} | {f"half round_to={multiple}": multiple for multiple in self.round_to}


@dataclass(frozen=True)
class Network:
    """One network on disk."""

    name: str
    kind: Literal["dense", "pruned"]
    macs: int
    parameters: int
    artefacts: dict[str, Artefact]
    """Under "checkpoint" and under the precision of each ONNX file; paths are relative to the suite's folder."""
    failures: dict[str, str] = field(default_factory=dict)
    """File that is missing -> why."""


def make_networks(
    family: Family, folder: Path, *, precisions: Sequence[Precision], cores: int
) -> tuple[dict[str, Network], dict[str, str]]:
    """All networks at once, each in a process of its own; those that could not be made with the reason."""
    names = family.names()
    threads = max(1, cores // len(names))

    def make(name: str) -> Network | Exception:
        arguments = {"name": name, "family": family, "folder": folder, "precisions": precisions, "threads": threads}
        try:
            network: Network = call(make_network, arguments, what=f"Making {name!r}")
        except Exception as error:  # noqa: BLE001 - whatever it was, the other networks stand
            return error
        return network

    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(make, names), strict=True))
    made = {name: item for name, item in found.items() if isinstance(item, Network)}
    return made, {name: first_line(item) for name, item in found.items() if isinstance(item, Exception)}


def make_network(*, name: str, family: Family, folder: Path, precisions: Sequence[Precision], threads: int) -> Network:
    """Build, prune and write one network. An ONNX file that cannot be written is among its `failures`."""
    torch.set_num_threads(threads)
    images = torch.randn(IMAGES, *family.shape, generator=torch.Generator().manual_seed(0))
    multiple = family.names()[name]
    model = build(family.factory) if multiple is None else pruned(family.factory, images, family.macs_kept, multiple)
    _settle(model, images)
    home = folder / name.replace(" ", "-").replace("=", "-")
    checkpoint.save(model, home / CHECKPOINT, factory=family.factory, image_shape=family.shape)
    artefacts = {CHECKPOINT: _artefact(home / CHECKPOINT, folder, "fp32")}
    failures: dict[str, str] = {}
    counts = macs(model, images[:1]), parameters(model)
    source = home / "fp32.onnx"
    for precision in ("fp32", *(precision for precision in precisions if precision != "fp32")):
        path = home / f"{precision}.onnx"
        try:
            if precision == "fp32":
                export_onnx(model, path, image_shape=family.shape)
            else:
                _write_half(model, source, path, family.shape)
            artefacts[precision] = _artefact(path, folder, precision)
        except Exception as error:  # noqa: BLE001 - PyTorch can still run the network
            failures[f"{precision}.onnx"] = f"{type(error).__name__}: {first_line(error)}"
    kind: Literal["dense", "pruned"] = "dense" if multiple is None else "pruned"
    return Network(name, kind, *counts, artefacts, failures)


def _settle(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch normalisation the statistics of these images."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over all batches, here of one
    with torch.no_grad():
        model.train()(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


def _write_half(model: nn.Module, source: Path, path: Path, shape: tuple[int, int, int]) -> None:
    """The network in fp16: by AutoCast where that is installed, else exported as it is in half precision."""
    try:
        to_half(source, path, "fp16", fp32_io=False, samples=None)
    except MissingExtraError:
        half = copy.deepcopy(model).half()
        try:
            _export_half(half, path, shape, "cpu")
        except Exception:  # not every PyTorch traces half precision on a CPU
            if not torch.cuda.is_available():
                raise
            _export_half(half.cuda(), path, shape, "cuda")


def _export_half(model: nn.Module, path: Path, shape: tuple[int, int, int], device: str) -> None:
    with evaluating(model), torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *shape, dtype=torch.float16, device=device),),
            dynamo=True,
            verbose=False,
            optimize=True,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
        )
    assert program is not None  # a TorchScript export would return None
    with onnx_file.writing(path) as scratch:
        program.save(scratch)


def _artefact(path: Path, folder: Path, precision: str) -> Artefact:
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.iterdir())
        digest = checkpoint.Architecture.read(path).sha256
    else:
        size, digest = path.stat().st_size, sha256(path)
    return Artefact(path=str(path.relative_to(folder)), sha256=digest, size_bytes=size, precision=precision)
