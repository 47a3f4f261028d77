"""What the suite found so far: as one document, and as rows for the table of what was verified."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from benchmarks.gpu_suite.engines import Files
from benchmarks.gpu_suite.groups import Group, Mode, Precision
from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.measure import AGAIN, Measured, Measurement
from benchmarks.harness.peaks import Peak
from benchmarks.harness.results import Results, Runtime, VariantResult
from benchmarks.harness.roofline import RooflineResult, TimedLayer
from compress.errors import EspalierError
from deploy.work import onnx_work

NOT_MEASURED = {
    "accuracy": "weights are random: latency does not depend on them; espalier compare finds accuracies.",
    "server": "the time goes to latencies; espalier bench --scenario Server measures it.",
    "throughput": "the time goes to latencies; espalier bench --streams measures it.",
    "layers": "the time goes to latencies; espalier bench --explain times layers.",
}

NOTES = {
    "load_s": "without importing PyTorch, which all processes of a group do at the same time beforehand",
    "fp32": "nothing is rounded to TF32",
    "fp16": "PyTorch runs the fp32 checkpoint after .half(), whose size in bytes is that of the checkpoint",
    "rooflines": "from the ONNX file of the same precision; layers were not timed and are left out",
}


@dataclass
class Cell:
    """One network in one mode and precision."""

    measurements: dict[int, BatchMeasurement] = field(default_factory=dict)
    rooflines: dict[int, RooflineResult] = field(default_factory=dict)
    description: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)


@dataclass
class Collected:
    """Everything that the suite has found so far."""

    created: datetime
    recipe: dict[str, Any]
    environment: dict[str, Any]
    device: str
    files: Files
    peaks: Mapping[str, Peak]
    """By the type that networks compute in."""
    tests: dict[str, Any] | None = None
    failures: list[dict[str, str]] = field(default_factory=list)
    """What could not be done: {"what", "why"}."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Groups that were not measured: {"what", "why"}."""
    cells: dict[tuple[Mode, Precision, str], Cell] = field(default_factory=dict)

    def fail(self, what: object, why: str) -> None:
        entry = {"what": str(what), "why": why}
        if entry not in self.failures:
            self.failures.append(entry)

    def leave_out(self, group: Group, why: str) -> None:
        self.left_out.append({"what": str(group), "why": why})

    def add(self, group: Group, names: Mapping[str, str], measurement: Measurement) -> None:
        """Take in what was measured of a group; `names` are those of the variants, with their networks."""
        for variant, network in names.items():
            cell = self.cells.setdefault((group.mode, group.precision, network), Cell())
            for name in (variant, AGAIN.format(variant)):
                if name in measurement.failures:
                    again = "" if name == variant else "the second run of it: "
                    cell.failures.append(f"batch {group.batch_size}: {again}{measurement.failures[name]}")
            measured = measurement.variants.get(variant)
            if measured is not None:
                cell.measurements[group.batch_size] = BatchMeasurement.of(measured, measurement)
                cell.description = cell.description or measured.description or None
                self._limit(group, network, cell, measured)

    def add_failure(self, group: Group, names: Mapping[str, str], why: str) -> None:
        """None of these variants could be measured."""
        self.fail(group, why)
        for network in names.values():
            cell = self.cells.setdefault((group.mode, group.precision, network), Cell())
            cell.failures.append(f"batch {group.batch_size}: {why}")

    def measured(self) -> bool:
        return any(cell.measurements for cell in self.cells.values())

    def results(self, now: datetime) -> Results:
        """The document as it is now."""
        variants = [self._variant(*key, cell) for key, cell in self.cells.items()]
        not_measured: dict[Any, str] = dict(NOT_MEASURED)
        if not any(variant.rooflines for variant in variants):
            not_measured["roofline"] = "no peak of this machine, or no ONNX file to count the work of."
        return Results(
            created=self.created,
            recipe=self.recipe,
            seeds={"weights": 0, "inputs": 0, "measuring": 0},
            environment=self.environment,
            variants=variants or [self._placeholder()],
            pruning=None,
            training={},
            not_measured=not_measured,
            provenance={
                "command": "python -m benchmarks.gpu_suite",
                "ended": now.isoformat(),
                "tests": self.tests,
                "failures": self.failures,
                "left_out": self.left_out,
                "peaks": [peak.model_dump(mode="json") for peak in self.peaks.values()],
                "notes": NOTES,
            },
        )

    def _limit(self, group: Group, network: str, cell: Cell, measured: Measured) -> None:
        artefact = self.files.artefact(network, "onnx", group.precision)
        if not self.peaks or artefact is None:
            return
        try:
            work = onnx_work(self.files.path(artefact), group.batch_size)
            found = RooflineResult.of(
                batch_size=group.batch_size,
                network=[TimedLayer(layer.name, layer.kind, layer.work, layer.dtype) for layer in work.fused],
                network_bytes=work.traffic_bytes,
                measured_ms=measured.median_ms.value,
                peaks=self.peaks,
                uncounted=work.uncounted,
            )
        except (HarnessInputError, EspalierError) as error:
            self.fail(f"roofline of {network}, {group}", str(error))
            return
        cell.rooflines[group.batch_size] = found.model_copy(update={"layers": []})

    def _variant(self, mode: Mode, precision: Precision, network: str, cell: Cell) -> VariantResult:
        found = self.files.networks[network]
        artefact = self.files.artefact(network, mode.opens, precision)
        assert artefact is not None  # else it would have had no candidate
        about = cell.description
        planned = mode.runtime.partition(":")[0]
        return VariantResult(
            name=variant_name(network, mode, precision),
            kind=found.kind,
            artefact=artefact,
            runtime=Runtime(
                name=about["runtime"] if about else planned,
                version=about["version"] if about else "not known",
                device=about["device"] if about else self.device,
                proof=about,
            ),
            parameters=found.parameters,
            macs=found.macs,
            accuracy=None,
            parity=None,
            measurements=[cell.measurements[size] for size in sorted(cell.measurements)],
            rooflines=[cell.rooflines[size] for size in sorted(cell.rooflines)],
            failure="; ".join(cell.failures) or None,
        )

    def _placeholder(self) -> VariantResult:
        """Stands in the document, which must name a variant, as long as none was measured."""
        name, found = next(iter(self.files.networks.items()))
        return VariantResult(
            name=name,
            kind=found.kind,
            artefact=next(iter(found.artefacts.values())),
            runtime=Runtime(name="none", version="not known", device=self.device, proof=None),
            parameters=found.parameters,
            macs=found.macs,
            accuracy=None,
            parity=None,
            measurements=[],
            failure="nothing has been measured; provenance says why",
        )


def variant_name(network: str, mode: Mode, precision: Precision) -> str:
    """Unique among the variants of one runtime."""
    return f"{network} {precision}" + (f" · {mode.label}" if mode.label else "")


def table_rows(found: Collected, modes: tuple[Mode, ...], gpu: str) -> list[str]:
    """Rows of the table in benchmarks/results/README.md: one for each mode, and one for the tests."""
    where = f"{gpu}, {_driver(found.environment)}, {found.created:%Y-%m-%d}"
    rows = []
    for mode in modes:
        cells = {key: cell for key, cell in found.cells.items() if key[0] == mode}
        timed: dict[str, set[int]] = {}
        for (_, precision, _), cell in cells.items():
            timed.setdefault(precision, set()).update(cell.measurements)
        sizes = "; ".join(
            f"{precision} at batch {', '.join(map(str, sorted(batches)))}"
            for precision, batches in timed.items()
            if batches
        )
        failed = [failure for cell in cells.values() for failure in cell.failures]
        failed += [item["why"] for item in found.failures if item["what"].startswith(mode.name)]
        if sizes:
            version = next((cell.description["version"] for cell in cells.values() if cell.description), "not known")
            text = f"timed: {where}, version {version}: {sizes}"
        else:
            text = f"not verified on {gpu}"
        rows.append(f"| {mode.name} | {found.device} | {text}{f'. Failed: {failed[0]}' if failed else ''} |")
    if found.tests is not None:
        outcome = f"{where}, torch {found.environment['libraries'].get('torch')}: {found.tests['closing']}"
        failures = "".join(f"<br>{line}" for line in found.tests["failed"])
        rows.append(f'| tests that need a GPU, `pytest -m "gpu or tensorrt"` | {found.device} | {outcome}{failures} |')
    return rows


def _driver(environment: dict[str, Any]) -> str:
    drivers = {str(gpu["driver"]) for gpu in environment["gpus"] if gpu.get("driver")}
    return f"driver {', '.join(sorted(drivers))}" if drivers else "no driver"
