"""Deployable files, checkpoints and functions timed against each other, whatever they came from."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.conditions import Watch
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.measure import AGAIN, Measurement, measure
from benchmarks.harness.results import Results, Runtime, Section, VariantResult, csv_text
from compress.files import make_directory, write_text
from compress.progress import progress_bar
from deploy.bench_inputs import write_inputs
from deploy.bench_load import overhead as harness_overhead
from deploy.bench_load import serve, sweep_throughput
from deploy.bench_settings import Settings
from deploy.bench_targets import Opening, Target, common_inputs
from deploy.limits import Limits, Measurable, find_limits
from deploy.pool import read_arrays
from deploy.runtimes import RUNTIMES
from deploy.watching import shown_on, watched

logger = logging.getLogger(__name__)

FEW = 5
"""Queries in a turn; fewer make a poor median."""


def bench(targets: Sequence[Target], settings: Settings, opening: Opening) -> Results:
    """Measure the targets against the first of them.

    A target that fails has its failure in the results (see `require_all`); the others' figures stand.

    Raises:
        InputError: they take different inputs, or a setting does not fit them; or one cannot be opened.
    """
    specs = common_inputs(targets, settings.shapes, settings.batch_sizes)
    cells: dict[str, list[BatchMeasurement]] = {target.name: [] for target in targets}
    failures: dict[str, str] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    limits: list[Limits] = []
    with TemporaryDirectory(prefix="espalier-bench-") as folder, watched(opening.device) as watch:
        pool = Path(folder)
        inputs = write_inputs(pool, specs, settings, opening)
        for batch_size in settings.batch_sizes:
            found = _measure(targets, settings, opening, pool, batch_size, watch)
            failures |= {name.removesuffix(AGAIN.format("")): reason for name, reason in found.failures.items()}
            for name, measured in found.variants.items():
                cells[name].append(BatchMeasurement.of(measured, found, gap_s=settings.plan.idle_gap_s))
                descriptions[name] = measured.description
            few = min((samples.size for one in found.variants.values() for samples in one.rounds_ns), default=FEW)
            if few < FEW:
                logger.warning("%d queries in a turn at batch %d are few: give a longer --time", few, batch_size)
            limits.append(_limits(targets, settings, opening, pool, batch_size, found))
        alive = [target for target in targets if target.name not in failures]
        overhead = None if settings.limit_ms is None else harness_overhead(settings)
        servers = serve(alive, settings, opening, pool, failures)
        sweeps = sweep_throughput(alive, settings, opening, pool, failures)
    return Results(
        created=datetime.now(UTC),
        recipe={"bench": _as_json(settings, opening)},
        seeds={"measuring": settings.seed},
        environment=environment(),
        variants=[
            VariantResult(
                name=target.name,
                artefact=target.artefact,
                runtime=_runtime(target, descriptions.get(target.name), opening.device),
                parameters=None,
                macs=next((found.macs[target.name] for found in limits if target.name in found.macs), None),
                accuracy=None,
                parity=None,
                measurements=cells[target.name],
                server=servers.get(target.name),
                throughput=sweeps.get(target.name),
                rooflines=[found.rooflines[target.name] for found in limits if target.name in found.rooflines],
                failure=failures.get(target.name),
            )
            for target in targets
        ],
        pruning=None,
        training={},
        overhead=overhead,
        explanations=[explanation for found in limits for explanation in found.explanations],
        not_measured=_left_out(settings, limits),
        provenance={"command": "espalier bench", "inputs": inputs},
    )


def write(results: Results, directory: Path) -> None:
    """Write results.json, results.csv, report.html and the figures.

    Raises:
        InputError: the directory cannot be written.
        WorkError: the disk is full.
    """
    # Drawing takes a second to load, and most measurements are only read in the terminal.
    from benchmarks.harness.figure_files import write_figures
    from benchmarks.harness.report import report_html

    make_directory(directory)
    write_text(directory / "results.json", results.to_json())
    write_text(directory / "results.csv", csv_text(results))
    write_text(directory / "report.html", report_html(results))
    write_figures(results, directory / "figures")


def require_all(results: Results) -> None:
    """Raise what failed, once the rest has been shown.

    Raises:
        HarnessError: one line for each target that could not be measured to the end.
    """
    failures = [f"{variant.name}: {variant.failure}" for variant in results.variants if variant.failure]
    if failures:
        raise HarnessError("\n".join(failures))


def _measure(
    targets: Sequence[Target], settings: Settings, opening: Opening, pool: Path, batch_size: int, watch: Watch
) -> Measurement:
    with progress_bar(f"timing at batch {batch_size}", None) as bar:
        try:
            return measure(
                [opening.candidate(target, pool=pool, batch_size=batch_size) for target in targets],
                baseline=targets[0].name,
                plan=settings.plan,
                seed=settings.seed,
                watch=watch,
                on_round=shown_on(bar),
            )
        except HarnessError as error:  # at another batch size they may live
            return Measurement(
                baseline=targets[0].name,
                variants={},
                failures={target.name: f"batch {batch_size}: {error}" for target in targets},
                again=None,
                order=(),
                reruns=0,
                stopped_by="time",
                elapsed_s=0.0,
            )


def _limits(
    targets: Sequence[Target], settings: Settings, opening: Opening, pool: Path, batch_size: int, found: Measurement
) -> Limits:
    measured = [
        Measurable(
            target.name,
            Path(target.place),
            runtime=target.runtime,
            trusted_manifest=opening.trusted_manifest if target.kind == "plan" else None,
            trust=opening.trust,
        )
        for target in targets
        if target.kind != "function"
    ]
    return find_limits(
        measured,
        [array[:batch_size] for array in read_arrays(pool)],
        found.variants,
        device=opening.device,
        threads=opening.number_of_threads,
        with_layers=settings.explain,
    )


def _runtime(target: Target, description: dict[str, Any] | None, device: str) -> Runtime:
    """What ran it, as it told; of one that never ran, what was to run it."""
    if description is not None:
        return Runtime(
            name=description["runtime"],
            version=description["version"],
            device=description["device"],
            proof=description,
        )
    suffix = {"onnx": ".onnx", "plan": ".plan"}.get(target.kind)
    default = next(name for name, kind in RUNTIMES.items() if kind.suffix == suffix)
    name = "python" if target.kind == "function" else (target.runtime or default).partition(":")[0]
    return Runtime(name=name, version="not known", device=device, proof=None)


def _as_json(settings: Settings, opening: Opening) -> dict[str, Any]:
    asked = {**asdict(settings), "device": opening.device, "threads": opening.number_of_threads}
    found: dict[str, Any] = json.loads(json.dumps(asked))  # tuples become lists
    return found


def _left_out(settings: Settings, limits: Sequence[Limits]) -> dict[Section, str]:
    found: dict[Section, str] = {
        "accuracy": "espalier bench times files and does not know the labels; espalier compare finds accuracies."
    }
    if settings.limit_ms is None:
        found["server"] = "no limit of latency was given; ask with --scenario Server --limit MS."
    if not settings.lanes:
        found["throughput"] = "no numbers of queries at once were given; ask with --streams 1,2,4."
    if not settings.explain:
        found["layers"] = "layers were not timed; ask with --explain."
    problems = list(dict.fromkeys(f"{name}: {problem}" for limit in limits for name, problem in limit.problems.items()))
    if problems:
        found["roofline"] = "; ".join(problems)
    return found
