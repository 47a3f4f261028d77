"""Which file of a run to serve, and which file says how to feed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness.results import VariantResult, load
from compress.checkpoint import Architecture
from compress.errors import InputError
from compress.files import sha256
from deploy import manifest
from deploy.precision import PRECISIONS
from deploy.run_directory import RunDirectory

Device = Literal["cpu", "cuda"]
Kind = Literal["onnx", "plan"]

_EXECUTED_BY = {"onnx": "onnxruntime", "plan": "tensorrt"}
_PLAIN_PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
"""Providers that execute the file as it is; TensorRT's provider times an engine that is not in the file."""


@dataclass(frozen=True)
class Choice:
    """A file that lies unchanged beside its manifest, and why it was chosen."""

    path: Path
    entry: manifest.Entry
    timed: VariantResult | None
    """Its measurements, on the device on which it was fastest; None if it was not timed."""
    reason: str

    @property
    def device(self) -> str | None:
        """Where it was timed: "cpu" or "cuda"; None if it was not."""
        return None if self.timed is None else _device(self.timed)


def choose_artefact(
    run: Path, *, device: Device | None = None, kind: Kind | None = None, artefact: str | None = None
) -> Choice:
    """The file of a run directory that is best served.

    Unless `artefact` names it, it is a file of the pruned network that suits the device, and of those
    1. an engine, if there is one: it was built to be served; the fastest measured, else the one built last;
    2. else the ONNX file that gave most images per second at the batch size that suits it best;
    3. else, where none was timed, the ONNX file with the widest number format, which is closest to the checkpoint.
    A file that was changed since it was written is refused, not passed over.

    Args:
        device: where it will run; None: wherever it was fastest.
        kind: only files of this kind.
        artefact: a file name in the run's `artifacts/`.

    Raises:
        InputError: there is no such run or file, none suits the device, or the file was changed.
        HarnessInputError: results.json is damaged.
    """
    directory = RunDirectory(Path(run))
    if not (directory.artifacts / manifest.FILE_NAME).is_file():
        raise InputError(
            f"{run} is no run directory with artefacts: it holds no {directory.artifacts.name}/{manifest.FILE_NAME}; "
            "give the directory of an espalier run that is complete."
        )
    entries = manifest.read(directory.artifacts).entries
    variants = load(directory.results).variants if directory.complete else []
    if artefact is not None:
        entry = next((entry for entry in entries if entry.file == artefact), None)
        if entry is None:
            known = ", ".join(entry.file for entry in entries) or "nothing"
            raise InputError(f"There is no artefact {artefact!r} in {directory.artifacts}, which lists {known}.")
        timed, reason = _fastest_run(entry, variants, device), "it was asked for"
    else:
        digest = Architecture.read(directory.pruned).sha256
        own = [entry for entry in entries if entry.checkpoint_sha256 == digest]
        fitting = [entry for entry in own if _suits(entry, device) and kind in (None, entry.kind)]
        if not fitting:
            where = f" runs on {device}" if device else " can be served"
            found = ", ".join(entry.file for entry in own) or "nothing"
            raise InputError(
                f"No artefact of the pruned network{where}: {directory.artifacts} lists {found} of it; "
                "write one there with espalier export, or name an artefact."
            )
        entry, timed, reason = _best(fitting, variants, device)
    path = directory.artifacts / entry.file
    manifest.verify_file(path)
    return Choice(path, entry, timed, reason)


def describing_onnx(path: Path, *, listed: Path | None = None) -> Path:
    """The ONNX file whose metadata say how to feed an artefact: itself, or for an engine the one it was built from.

    Args:
        listed: the manifest in which the engine stands; None: the one beside it.

    Raises:
        InputError: the ONNX file that an engine was built from does not lie beside it any more.
    """
    if path.suffix != ".plan":
        return path
    listed = listed or path.parent / manifest.FILE_NAME
    found = manifest.read_file(listed)
    entry = found.entry(path.name)
    if entry is None:
        raise InputError(f"{path} does not stand in {listed}: build it again with espalier engine.")
    for source in found.entries:
        beside = path.parent / source.file
        if (
            source.kind == "onnx"
            and source.sha256 == entry.source_sha256
            and beside.is_file()
            and sha256(beside) == source.sha256
        ):
            return beside
    raise InputError(
        f"An engine does not hold class names and normalisation, and the ONNX file that {path} was built from "
        f"(SHA-256 {entry.source_sha256[:12] or 'not recorded'}…) does not lie unchanged in {path.parent}: put it "
        "there, or export it and build the engine again with espalier engine."
    )


def images_per_second(variant: VariantResult) -> float:
    """The highest throughput among the batch sizes timed; 0 if none was."""
    return max((measured.throughput_per_s.value for measured in variant.measurements), default=0.0)


def _best(
    entries: Sequence[manifest.Entry], variants: Sequence[VariantResult], device: Device | None
) -> tuple[manifest.Entry, VariantResult | None, str]:
    engines = [entry for entry in entries if entry.kind == "plan"]
    candidates = engines or list(entries)
    what = "engines" if engines else "ONNX files"
    timings = [(entry, _fastest_run(entry, variants, device)) for entry in candidates]
    timed = [(entry, variant) for entry, variant in timings if variant is not None]
    if timed:
        entry, variant = max(timed, key=lambda pair: images_per_second(pair[1]))
        accuracy = _accuracy(variant)
        return entry, variant, f"of the pruned network's {what} that were timed, it is the fastest{accuracy}"
    if engines:
        last = max(engines, key=lambda entry: entry.created)
        return last, None, "of the pruned network's engines, none of them timed, it was built last"
    widest = min(entries, key=lambda entry: PRECISIONS.index(entry.precision))
    return widest, None, f"of the pruned network's {what}, none of them timed, it is closest to the checkpoint"


def _accuracy(variant: VariantResult) -> str:
    found = variant.accuracy
    return f", with a {found.metric} of {found.top1_percent.value:.2f} %" if found else ""


def _suits(entry: manifest.Entry, device: Device | None) -> bool:
    if entry.kind == "plan":
        return device != "cpu"
    return device is None or entry.target in ("any", "cpu" if device == "cpu" else "gpu")


def _fastest_run(
    entry: manifest.Entry, variants: Sequence[VariantResult], device: Device | None
) -> VariantResult | None:
    """What results.json says about the very file; a file may have been timed on several devices."""
    runs = [
        variant
        for variant in variants
        if variant.artefact.sha256 == entry.sha256
        and variant.measurements
        and variant.runtime.name == _EXECUTED_BY[entry.kind]
        and _device(variant) is not None
        and device in (None, _device(variant))
    ]
    return max(runs, key=images_per_second, default=None)


def _device(variant: VariantResult) -> str | None:
    """ "cpu" or "cuda"; None where a provider did not execute the file as it is."""
    proof = variant.runtime.proof
    if isinstance(proof, dict) and isinstance(provider := proof.get("provider"), str):
        return _PLAIN_PROVIDERS.get(provider)
    return variant.runtime.device.partition(":")[0]
