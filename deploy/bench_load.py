"""Targets under load: the highest rate that keeps a limit of latency, and throughput over batches and lanes."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness.errors import HarnessError
from benchmarks.harness.open_loop import NullSubject
from benchmarks.harness.processes import RemoteSession
from benchmarks.harness.server import NullOverhead, ServerResult, highest_rate, null_overhead
from benchmarks.harness.subject import Candidate
from benchmarks.harness.throughput import ThroughputResult, sweep
from compress.errors import EspalierError
from compress.progress import progress_bar
from deploy.bench_settings import Settings
from deploy.bench_targets import Opening, Target


def serve(
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
        except (EspalierError, HarnessError) as error:
            failures[target.name] = f"Server: {error}"
        finally:
            session.close()
    return found


def overhead(settings: Settings) -> NullOverhead:
    """Of the loop that offers load, in a process like those that it is offered to."""
    session = RemoteSession(Candidate("nothing", NullSubject))
    try:
        session.ready()
        return null_overhead(session, lanes=settings.lanes[0] if settings.lanes else 1, seed=settings.seed)
    finally:
        session.close()


def sweep_throughput(
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
                except (EspalierError, HarnessError) as error:
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
