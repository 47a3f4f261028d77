"""The suite from beginning to end: tests and networks, peaks, groups of cells, results; all within the time given."""

import os
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.gpu_suite.deadline import Deadline, ending_workers
from benchmarks.gpu_suite.document import Collected, table_rows
from benchmarks.gpu_suite.engines import Files, unavailable
from benchmarks.gpu_suite.groups import BATCH_SIZES, TIERS, Mode, Precision, Tier, groups
from benchmarks.gpu_suite.networks import Family, make_networks
from benchmarks.gpu_suite.timing import Timing, time_groups
from benchmarks.gpu_suite.verification import TestRun
from benchmarks.harness.conditions import Watch
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.peaks import Peak, measured_peak
from benchmarks.harness.processes import call
from benchmarks.harness.results import csv_text, load
from compress.errors import WorkError, first_line
from compress.files import make_directory, write_text
from deploy.engine_settings import BatchRange
from deploy.pool import write_pool
from deploy.watching import watched

ROOT = Path(__file__).parents[2]

PREPARING = 0.35
"""Share of the time after which tests and networks that are not done are ended."""

REPORT = 0.08
"""Share of the time that is kept for the report."""

ENDING_S = 1.0
"""For what comes after the last process."""

POOL_BATCHES = 3
"""Batches of the largest size in the pool of inputs: each query copies another one to the GPU."""

DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Settings:
    """What one run of the suite does."""

    out: Path
    minutes: float = 8.0
    """For everything."""
    device: str = "cuda"
    threads: int = field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    """CPU threads of one inference; on a GPU they only launch it."""
    family: Family = field(default_factory=Family)
    tiers: tuple[Tier, ...] = TIERS
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    tests: tuple[str, ...] = ("tests",)
    """Where tests that need a GPU are looked for; none runs none."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(dict.fromkeys(precision for tier in self.tiers for precision in tier.precisions))

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(dict.fromkeys(mode for tier in self.tiers for mode in tier.modes))


def run(settings: Settings, gpu: str) -> Path:
    """Run the suite; what cannot be done stands in the document with its reason.

    Args:
        gpu: what the document and the files are called after.

    Returns:
        The document, which was written after every group; its CSV and report stand beside it.

    Raises:
        InputError: the directory cannot be written.
        WorkError: no network could be made, so there is nothing to measure.
    """
    deadline = Deadline(60 * settings.minutes)
    make_directory(settings.out)
    path = settings.out / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory(prefix="espalier-gpu-") as home, ExitStack() as running:
        folder = Path(home)
        tests = None
        if settings.tests:
            tests = TestRun(settings.tests, ROOT)
            running.callback(tests.stop)
        created, machine = datetime.now(UTC), environment(ROOT)
        preparing_s = PREPARING * 60 * settings.minutes
        with ending_workers(preparing_s - deadline.elapsed_s()) as ended:
            made, failures = make_networks(settings.family, folder, precisions=settings.precisions, cores=cores)
        if ended.is_set():
            failures = dict.fromkeys(failures, f"it was not made within {preparing_s:.0f} s")
        _say(deadline, f"{len(made)} networks made")
        if not made:
            raise WorkError(f"No network could be made: {next(iter(failures.values()))}.")
        outcome = None
        if tests is not None:
            outcome = tests.outcome(preparing_s - deadline.elapsed_s())
            _say(deadline, f"tests: {outcome['closing']}")
        sizes = sorted(settings.batch_sizes)
        found = Collected(
            created=created,
            recipe=_recipe(settings),
            environment=machine,
            device=settings.device,
            files=Files(folder, made, BatchRange(minimum=sizes[0], optimum=settings.batch_sizes[0], maximum=sizes[-1])),
            peaks={},
            tests=outcome,
        )
        for name, why in failures.items():
            found.fail(f"network {name}", why)
        for network in made.values():
            for file, why in network.failures.items():
                found.fail(f"{file} of {network.name}", why)
        found.peaks = _peaks(settings, found)
        pool = folder / "pool"
        _write_pool(pool, settings)
        waiting = groups(settings.tiers, settings.batch_sizes)
        for mode in settings.modes:
            reason = unavailable(mode, settings.device)
            if reason is not None:
                found.fail(mode.name, reason)
                waiting = [group for group in waiting if group.mode != mode]
        report_s = REPORT * 60 * settings.minutes
        timing = Timing(settings.device, settings.threads, pool, _watch(settings, found, running))

        def keep(what: str) -> None:
            write_text(path, found.results(datetime.now(UTC)).to_json())
            _say(deadline, what)

        keep(f"{len(waiting)} groups to time")
        time_groups(waiting, found, timing, left_s=lambda: deadline.left_s() - report_s, on_group=keep)
        results = found.results(datetime.now(UTC))
    write_text(path, results.to_json())
    write_text(path.with_suffix(".csv"), csv_text(results))
    sys.stdout.write("\n".join(table_rows(found, settings.modes, gpu)) + "\n")
    sys.stdout.flush()
    _write_report(path, deadline)
    return path


def write_report(*, path: Path) -> None:
    """The report of the document `path`, beside it."""
    from benchmarks.harness.report import report_html

    write_text(path.with_suffix(".html"), report_html(load(path)))


def _write_report(path: Path, deadline: Deadline) -> None:
    """In a process of its own, as drawing may take longer than there is time."""
    with ending_workers(deadline.left_s() - ENDING_S) as ended:
        try:
            call(write_report, {"path": path}, what="Writing the report")
        except Exception as error:  # noqa: BLE001 - the figures are on disk; the report can be made of them later
            why = "the time was over" if ended.is_set() else f"{type(error).__name__}: {first_line(error)}"
            _say(deadline, f"no report was written: {why}; make it with espalier report {path}")


def _peaks(settings: Settings, found: Collected) -> dict[str, Peak]:
    """What the machine can do at best, by type."""
    peaks = {}
    for dtype in [DTYPES[precision] for precision in settings.precisions]:
        try:
            peaks[dtype] = measured_peak(dtype, device=settings.device, threads=settings.threads)
        except Exception as error:  # noqa: BLE001 - latencies stand without a limit beside them
            found.fail(f"peak in {dtype}", f"{type(error).__name__}: {first_line(error)}")
    if settings.device != "cpu":
        import torch

        torch.cuda.empty_cache()  # the matrices that the peak was measured with
    return peaks


def _watch(settings: Settings, found: Collected, running: ExitStack) -> Watch:
    try:
        return running.enter_context(watched(settings.device))
    except HarnessInputError as error:  # the driver and PyTorch name GPUs differently
        found.fail("watching the GPU", str(error))
        return running.enter_context(watched("cpu"))


def _write_pool(pool: Path, settings: Settings) -> None:
    count = POOL_BATCHES * max(settings.batch_sizes)
    write_pool(pool, [np.random.default_rng(0).standard_normal((count, *settings.family.shape), np.float32)])


def _recipe(settings: Settings) -> dict[str, Any]:
    return {
        "minutes": settings.minutes,
        "networks": asdict(settings.family) | {"round_to": list(settings.family.round_to)},
        "batch_sizes": list(settings.batch_sizes),
        "threads": settings.threads,
        "images": POOL_BATCHES * max(settings.batch_sizes),
    }


def _say(deadline: Deadline, what: str) -> None:
    sys.stderr.write(f"{deadline.elapsed_s():4.0f} s  {what}\n")
    sys.stderr.flush()
