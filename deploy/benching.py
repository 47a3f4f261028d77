"""Deployable files, checkpoints and functions timed against each other, whatever they came from."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.conditions import Watch
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.measure import Measurement, measure
from benchmarks.harness.processes import RemoteSession
from benchmarks.harness.results import Results, Runtime, Section, VariantResult, csv_text
from benchmarks.harness.rounds import Plan
from benchmarks.harness.server import ServerResult, highest_rate
from benchmarks.harness.throughput import ThroughputResult, sweep
from compress.errors import InputError
from compress.files import make_directory, write_text
from compress.progress import progress_bar
from deploy.bench_targets import Opening, Target, common_inputs
from deploy.limits import Limits, Measurable, find_limits
from deploy.pool import FLOATS, last_level_cache_bytes, pool_images, random_inputs, read_arrays, write_pool
from deploy.runtimes import RUNTIMES
from deploy.tensor_spec import TensorSpec
from deploy.watching import shown_on, watched

SERVER, SINGLE, MULTI, OFFLINE = "Server", "SingleStream", "MultiStream", "Offline"
SCENARIOS = (SINGLE, MULTI, OFFLINE, SERVER)
"""MLPerf's names; what is measured here is no submission."""

MULTI_SAMPLES = 8
"""Samples of a query in MLPerf's MultiStream."""

GAP_S = 0.25
"""Pause before the query that shows what a pause costs."""

OFFLINE_SAMPLES = 32
"""Samples of a query in Offline, where no batch is asked for."""


@dataclass(frozen=True)
class Settings:
    """What is measured of the targets, beyond how they are opened."""

    batch_sizes: tuple[int, ...] = (1,)
    plan: Plan = field(default_factory=lambda: Plan(idle_gap_s=GAP_S))
    """The time budget holds for each batch size, and for the server and the sweep of each target."""
    data: str | None = None
    """Source of real samples (see `compress.data.load`); None draws them from a standard normal distribution."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    limit_ms: float | None = None
    """For the 99th percentile of the scenario Server; None leaves the scenario out."""
    lanes: tuple[int, ...] = ()
    """Numbers of queries at once that are swept, with every batch size; the server takes the first."""
    explain: bool = False
    """Whether the layers are timed, and compared with those of the first target."""
    seed: int = 0


def read_scenarios(names: Sequence[str], batch_sizes: Sequence[int], limit_ms: float | None) -> tuple[int, ...]:
    """The batch sizes that the scenarios ask for; `batch_sizes` are those of the user.

    Raises:
        InputError: a scenario is unknown, or lacks what it needs, or contradicts the batch sizes.
    """
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InputError(f"There is no scenario {unknown[0]!r}; choose from {', '.join(SCENARIOS)}.")
    if SERVER in names and limit_ms is None:
        raise InputError("The scenario Server needs a limit for the 99th percentile of latency: give --limit, in ms.")
    if names and SERVER not in names and limit_ms is not None:
        raise InputError(f"--limit is for the scenario {SERVER}: add it to --scenario, or leave --limit out.")
    if not names:
        return tuple(dict.fromkeys(batch_sizes)) or (1,)
    wanted = {SINGLE: (1,), MULTI: (MULTI_SAMPLES,), SERVER: (1,)}
    large = tuple(size for size in batch_sizes if size not in (1, MULTI_SAMPLES)) or (OFFLINE_SAMPLES,)
    asked = [size for name in names for size in wanted.get(name, large)]
    unused = sorted(set(batch_sizes) - set(asked))
    if unused:
        raise InputError(
            f"--batch {unused[0]} belongs to no scenario asked for ({', '.join(names)}): SingleStream has batches of 1,"
            f" MultiStream of {MULTI_SAMPLES}, Offline any other; leave one of the two out."
        )
    return tuple(dict.fromkeys(asked))


def read_numbers(text: str | None, option: str) -> tuple[int, ...]:
    """`1,8,32` -> numbers, each once.

    Raises:
        InputError: a part is no positive number.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (text is not None and not parts):
        raise InputError(f"{option} is {text!r}, but takes positive whole numbers with commas between, such as 1,8,32.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def bench(targets: Sequence[Target], settings: Settings, opening: Opening) -> Results:
    """Measure the targets against the first of them.

    Raises:
        InputError: they take different inputs, or a setting does not fit them; or one cannot be opened.
        HarnessError: nothing could be measured. Where one target fails, its failure stands in the results.
    """
    specs = common_inputs(targets, settings.shapes, settings.batch_sizes)
    cells: dict[str, list[BatchMeasurement]] = {target.name: [] for target in targets}
    failures: dict[str, str] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    limits: list[Limits] = []
    with TemporaryDirectory(prefix="espalier-bench-") as folder, watched(opening.device) as watch:
        pool = Path(folder)
        inputs = _write_pool(pool, specs, settings, opening)
        for batch_size in settings.batch_sizes:
            found = _measure(targets, settings, opening, pool, batch_size, watch)
            failures |= {name.removesuffix(" (again)"): reason for name, reason in found.failures.items()}
            for name, measured in found.variants.items():
                cells[name].append(BatchMeasurement.of(measured, found, gap_s=settings.plan.idle_gap_s))
                descriptions[name] = measured.description
            limits.append(_limits(targets, settings, opening, pool, batch_size, found))
        alive = [target for target in targets if target.name not in failures]
        servers = _serve(alive, settings, opening, pool, failures)
        sweeps = _sweep(alive, settings, opening, pool, failures)
    if not any(cells.values()):
        raise HarnessError(next(iter(failures.values())))
    return Results(
        created=datetime.now(UTC),
        recipe={},
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
        {name: variant.median_ms.value for name, variant in found.variants.items()},
        device=opening.device,
        threads=opening.number_of_threads,
        with_layers=settings.explain,
    )


def _serve(
    targets: Sequence[Target],
    settings: Settings,
    opening: Opening,
    pool: Path,
    failures: dict[str, str],
) -> dict[str, ServerResult]:
    """The highest rate of each target, all with the same arrivals; one that fails is entered in `failures`."""
    found: dict[str, ServerResult] = {}
    if settings.limit_ms is None:
        return found
    for target in targets:
        session = RemoteSession(opening.candidate(target, pool=pool, batch_size=1))
        try:
            session.ready()
            service_ms = session.warm(max(settings.plan.warmup_s, 0.1)) / 1e6
            with progress_bar(f"{target.name}: highest rate within {settings.limit_ms:g} ms", None) as bar:
                found[target.name] = highest_rate(
                    session,
                    limit_ms=settings.limit_ms,
                    service_ms=service_ms,
                    time_budget_s=settings.plan.time_budget_s,
                    lanes=settings.lanes[0] if settings.lanes else 1,
                    seed=settings.seed,
                    on_point=lambda point: bar.advance(f"{point.rate_per_s:.4g} queries a second"),
                )
        except HarnessError as error:
            failures[target.name] = f"Server: {error}"
        finally:
            session.close()
    return found


def _sweep(
    targets: Sequence[Target], settings: Settings, opening: Opening, pool: Path, failures: dict[str, str]
) -> dict[str, ThroughputResult]:
    """Throughput over batch sizes and lanes, all targets in the same rounds."""
    if not settings.lanes:
        return {}
    with ExitStack() as opened:
        sessions: dict[int, list[RemoteSession]] = {size: [] for size in settings.batch_sizes}
        for size in settings.batch_sizes:
            for target in targets:
                session = RemoteSession(opening.candidate(target, pool=pool, batch_size=size))
                opened.callback(session.close)
                try:
                    session.ready()
                except HarnessError as error:
                    failures[target.name] = f"throughput at batch {size}: {error}"
                else:
                    sessions[size].append(session)
        if not any(sessions.values()):
            return {}
        with progress_bar("throughput over batch sizes and lanes", None) as bar:
            return sweep(
                {size: ready for size, ready in sessions.items() if ready},
                lanes=settings.lanes,
                time_budget_s=settings.plan.time_budget_s * len(targets),
                seconds=settings.plan.seconds,
                warmup_s=settings.plan.warmup_s,
                seed=settings.seed,
                on_round=lambda done, planned: bar.advance(f"round {done} of {planned}"),
            )


def _write_pool(pool: Path, specs: Sequence[TensorSpec], settings: Settings, opening: Opening) -> str:
    """Write the inputs; say what they are."""
    sample_bytes = sum(
        int(np.prod([size for size in spec.shape[1:] if isinstance(size, int)])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
    cache = last_level_cache_bytes()
    count = max(pool_images(size, sample_bytes, cache) for size in settings.batch_sizes)
    if settings.data is None:
        write_pool(pool, random_inputs(specs, count, settings.seed))
        what = "random, standard normal"
    else:
        write_pool(pool, [_images(settings.data, specs, count, opening)])
        what = settings.data
    return f"{what}; {count} samples of {sample_bytes} bytes, with a last-level cache of {cache} bytes"


def _images(source: str, specs: Sequence[TensorSpec], count: int, opening: Opening) -> np.ndarray:
    """Images of the test split, again from the beginning where there are too few: at other places in memory."""
    from compress import data
    from deploy.stages import sample_images

    shape = specs[0].shape[1:]
    if len(specs) != 1 or len(shape) != 3 or specs[0].dtype not in FLOATS:
        raise InputError(
            f"--data gives images, but the network takes {'; '.join(map(str, specs))}: leave --data out, and its "
            "inputs are drawn at random."
        )
    side = shape[-1] if isinstance(shape[-1], int) else None
    loaded = data.load(source, batch_size=64, image_size=side, augment=False, trust=opening.trust)
    if loaded.image_shape != shape:
        raise InputError(f"{source} has images of {loaded.image_shape}, but the network takes {shape}: give others.")
    images = sample_images(loaded, at_least=1, at_most=count).numpy()
    return np.resize(images, (count, *shape))


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
