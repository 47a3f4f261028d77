"""The results document: every number of a run, raw samples included, in one validated JSON file.

The models below are the definition; `results.schema.json` beside this file is `schema()` written out, and a test
holds the two equal. The version changes whenever a document of the old form would no longer be read the same way.
"""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.measure import Measured, Measurement, Scenario
from benchmarks.harness.statistics import Estimate, Speedup, proportion_estimate_percent

SCHEMA_VERSION: Final = "espalier-results/1"

LATENCIES = ("median_ms", "mean_ms", "p90_ms", "p95_ms", "p99_ms")


class Record(BaseModel):
    """Base of all parts of the document: immutable, no unknown keys, no NaN or infinity (they are not JSON)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Artefact(Record):
    """The file that was timed."""

    path: str = Field(description="Path, relative to the run directory where it lies inside.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)
    precision: str = Field(description="Such as fp32, fp16, int8.")


class Runtime(Record):
    """What executed the artefact, and the proof that it did so on the device named."""

    name: str
    version: str
    device: str
    proof: JsonValue = Field(None, description="What the runtime itself reports, such as nodes per provider.")


class Accuracy(Record):
    """Accuracy of the very artefact that is timed, on the test split."""

    top1_percent: Estimate
    top5_percent: Estimate | None = Field(description="None where there are five classes or fewer.")
    loss: float | None = Field(description="Mean cross-entropy; None where the artefact gives no logits.")

    @classmethod
    def of(cls, *, top1_percent: float, top5_percent: float | None, loss: float | None, samples: int) -> "Accuracy":
        """From plain figures over `samples` images, adding their Wilson intervals."""
        return cls(
            top1_percent=proportion_estimate_percent(top1_percent, samples),
            top5_percent=None if top5_percent is None else proportion_estimate_percent(top5_percent, samples),
            loss=loss,
        )


class Latency(Record):
    """Time of one query from end to end. Percentiles are None where the samples are too few to carry them."""

    median_ms: Estimate
    mean_ms: Estimate
    p90_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None


class BatchMeasurement(Record):
    """One variant at one batch size under one scenario."""

    batch_size: int = Field(ge=1)
    scenario: Scenario = Field(description="MLPerf's names; not an MLPerf submission.")
    latency: Latency
    throughput_per_s: Estimate = Field(description="Images per second of wall time; samples counts images.")
    speedup: Speedup | None = Field(description="None for the baseline itself.")
    stopped_by: Literal["rounds", "time"] = Field(description="'time' if the time budget cut the plan short.")
    samples_ms: list[list[float]] = Field(description="Every latency measured: one list per round.")

    @classmethod
    def of(cls, measured: Measured, measurement: Measurement) -> "BatchMeasurement":
        """From what `measure` returns."""
        return cls(
            batch_size=measured.batch_size,
            scenario=measured.scenario,
            latency=Latency(**{name: getattr(measured, name) for name in LATENCIES}),
            throughput_per_s=measured.throughput_per_s,
            speedup=measured.speedup,
            stopped_by=measurement.stopped_by,
            samples_ms=[np.round(samples / 1e6, 6).tolist() for samples in measured.rounds_ns],
        )


class VariantResult(Record):
    """One network in one precision on one runtime."""

    name: str
    kind: Literal["dense", "pruned"]
    artefact: Artefact
    runtime: Runtime
    parameters: int = Field(ge=0)
    macs: int = Field(ge=0, description="Multiply-adds of one image.")
    accuracy: Accuracy | None
    parity: dict[str, JsonValue] | None = Field(description="How far its outputs lie from PyTorch's.")
    measurements: list[BatchMeasurement]


class BudgetResult(Record):
    """What pruning was to reach and what it reached, as fractions of the dense network's cost."""

    quantity: Literal["channels", "parameters", "macs", "latency"]
    requested_fraction: float = Field(gt=0, le=1)
    achieved_fraction: float = Field(gt=0)
    dense_cost: float = Field(gt=0, description="In the quantity's own unit; latency in milliseconds.")


class LayerWidths(Record):
    """Output channels of one layer."""

    name: str
    width_before: int = Field(ge=1)
    width_after: int = Field(ge=1)


class PruningEvent(Record):
    """One moment at which channels were removed."""

    index: int = Field(ge=1)
    minibatch: int = Field(ge=0, description="Minibatches seen when it happened.")
    loss: float | None = Field(description="Mean training loss since the event before.")
    cost: float = Field(ge=0, description="Cost after the event, in the unit of the budget's quantity.")
    widths: dict[str, int] = Field(description="Channels of every group after the event.")


class Pruning(Record):
    """How the dense network became the pruned one."""

    budget: BudgetResult
    layers: list[LayerWidths]
    events: list[PruningEvent]


class Results(Record):
    """The whole document."""

    schema_version: Literal["espalier-results/1"] = SCHEMA_VERSION
    created: AwareDatetime
    recipe: dict[str, JsonValue] = Field(description="The resolved recipe, or as much of it as there is.")
    seeds: dict[str, int]
    environment: dict[str, JsonValue]
    variants: list[VariantResult] = Field(min_length=1)
    pruning: Pruning | None
    training: dict[str, list[dict[str, float | int | None]]] = Field(
        description="Per phase, one record per epoch; units in the keys."
    )
    provenance: dict[str, JsonValue] = Field(
        description="Where it came from: command, checkpoints, versions, and why this runtime."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        keys = Counter((v.name, v.runtime.name, v.runtime.device, v.artefact.precision) for v in self.variants)
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise ValueError(f"variant {' / '.join(twice[0])} appears twice")
        return self

    def baseline_of(self, variant: VariantResult, speedup: Speedup) -> VariantResult | None:
        """The variant that `speedup` was measured against: on the same runtime, in the same precision if there."""
        same = [
            other
            for other in self.variants
            if other.name == speedup.baseline and other.runtime.name == variant.runtime.name
        ]
        same.sort(key=lambda other: other.artefact.precision != variant.artefact.precision)
        return same[0] if same else None

    def to_json(self) -> str:
        """The document as indented JSON text; the raw samples of a round stand on one line."""
        text = json.dumps(self.model_dump(mode="json"), allow_nan=False, indent=1)
        # Inside a JSON string a line break is always escaped, so this touches arrays of numbers only.
        return re.sub(r"\[\n[-+.,\deE\s]+\]", lambda match: re.sub(r"\s+", "", match[0]), text) + "\n"


def load(path: Path) -> Results:
    """Read and validate a results document.

    Raises:
        HarnessInputError: the file cannot be read, is not JSON, or is no document of this version.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessInputError(f"Cannot read {path}: {error.strerror}; give the path of a results.json.") from error
    except UnicodeDecodeError as error:
        raise HarnessInputError(f"{path} is not text, so it is no results document.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise HarnessInputError(
            f"{path} is no document of {SCHEMA_VERSION}: {place}: {first['msg']}; write it again with this version."
        ) from error


def rows(results: Results) -> list[dict[str, Any]]:
    """One tidy row per variant x runtime x precision x batch x scenario; a variant not timed has one row."""
    return [
        _row(variant, measurement)
        for variant in results.variants
        for measurement in (*variant.measurements, *([] if variant.measurements else [None]))
    ]


def csv_text(results: Results) -> str:
    """`rows` as CSV with a header; an absent figure is an empty cell."""
    table = rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def schema() -> dict[str, Any]:
    """The document's JSON Schema (2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA_VERSION.replace('/', ':')}",
        **Results.model_json_schema(mode="serialization"),
    }


def _row(variant: VariantResult, measurement: BatchMeasurement | None) -> dict[str, Any]:
    accuracy = variant.accuracy
    latency = measurement.latency if measurement else None
    speedup = measurement.speedup if measurement else None
    row: dict[str, Any] = {
        "variant": variant.name,
        "kind": variant.kind,
        "runtime": variant.runtime.name,
        "runtime_version": variant.runtime.version,
        "device": variant.runtime.device,
        "precision": variant.artefact.precision,
        "batch_size": measurement.batch_size if measurement else None,
        "scenario": measurement.scenario if measurement else None,
        "artefact": variant.artefact.path,
        "sha256": variant.artefact.sha256,
        "size_bytes": variant.artefact.size_bytes,
        "parameters": variant.parameters,
        "macs": variant.macs,
        "loss": accuracy.loss if accuracy else None,
    }
    row |= _cells("top1_percent", accuracy.top1_percent if accuracy else None)
    row |= _cells("top5_percent", accuracy.top5_percent if accuracy else None)
    for name in LATENCIES:
        row |= _cells(f"latency_{name}", getattr(latency, name) if latency else None)
    row |= _cells("throughput_per_s", measurement.throughput_per_s if measurement else None)
    row |= _cells("speedup", speedup)
    row["baseline"] = speedup.baseline if speedup else None
    row["verdict"] = speedup.verdict if speedup else None
    return row


def _cells(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    fields = {"": "value", "_low": "low", "_high": "high", "_samples": "samples"}
    return {f"{name}{suffix}": getattr(estimate, field, None) for suffix, field in fields.items()}
