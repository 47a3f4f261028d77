"""Scenario Server against queueing theory: python -m benchmarks.server_truth [--out FILE.json]

A model with a known, constant service time under Poisson arrivals is the queue M/D/1, whose percentiles are known
exactly. The harness must find them. Beside it stands the client that everyone writes first, which waits for a reply
before it sends the next query and counts from its own sending: on the same arrivals it must miss the queue.

Four 99th percentiles stand side by side. `exact` is that of the stationary queue. `measured` is the harness's, over as
many queries as keep its sampling error near 5 % (the queries of a busy queue are alike, so that takes tens of
thousands). `constant` is what Lindley's recursion gives for the very arrivals of the run if each query takes the
service time, and `actual` if each takes as long as it did in the run: measured / actual is the harness alone.

The theory holds for a constant service, and whatever else runs on the machine breaks that: a query that is stopped for
5 ms delays all behind it. Where `actual` is more than 5 % from `constant`, the attempt says nothing about M/D/1 and is
repeated, whatever it measured, and so is one that the harness itself calls invalid; every attempt is shown. It needs a
machine that nothing else uses: on a busy one it ends undecided.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.environment import environment
from benchmarks.harness.open_loop import SPIN_NS, NullSubject, Served
from benchmarks.harness.server import arrivals, null_overhead, run_load
from benchmarks.harness.session import Clock, LocalSession, Nanoseconds
from benchmarks.harness.statistics import SAMPLES_NEEDED, Floats
from benchmarks.harness.subject import Lane

QUERIES = {0.5: 12_000, 0.7: 32_000, 0.8: 80_000}
"""Utilisation -> queries of the full run, 170 s in all at 1 ms."""

CLOSED_QUERIES = 2000

TOLERANCE = 0.10
"""Of the measured 99th percentile from the exact one."""

CONSTANT = 0.05
"""The service counts as constant if its variation moves the 99th percentile by no more than this share."""

DIGITS = 120


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--service-ms", type=float, default=1.0, help="time of a query")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of queries")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--attempts", type=int, default=3, help="at each utilisation, for a service that is constant")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    options = parser.parse_args(arguments)

    model = ConstantService(round(1e6 * options.service_ms))
    session = RecordedSession("constant service", lambda: model, 1)
    nothing = LocalSession("nothing", NullSubject, 1)
    session.ready()
    nothing.ready()
    overhead = null_overhead(nothing, seed=options.seed)
    session.warm(0.1)
    service_ns = float(session.time(max(100, int(1000 * options.share))).latencies_ns.mean())
    rows: list[Row] = []
    for utilisation, full in QUERIES.items():
        queries = max(SAMPLES_NEEDED[99.0], int(full * options.share))
        for _ in range(options.attempts):
            rows.append(compare(session, model, utilisation, queries, service_ns, options.seed))
            if rows[-1].decides:
                break
    verdicts = {utilisation: verdict(rows, utilisation) for utilisation in QUERIES}
    result = {
        "service_ms": service_ns / 1e6,
        "seed": options.seed,
        "null_overhead": overhead.model_dump(),
        "rows": [vars(row) for row in rows],
        "verdicts": verdicts,
        "environment": environment(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    console = Console(width=150)
    console.print(table(rows, service_ns / 1e6))
    console.print(
        f"Null model: {overhead.overhead_us:.2f} µs a query; issued {overhead.lateness_median_us:.1f} µs late in the "
        f"median, {overhead.lateness_p99_us:.1f} µs at p99."
    )
    for utilisation, said in verdicts.items():
        console.print(f"Utilisation {utilisation:g}, within {TOLERANCE:.0%} of M/D/1: {said}")
    return 0 if set(verdicts.values()) == {"holds"} else 1


class RecordedSession(LocalSession):
    """A session that keeps when each query of the last run was issued and done."""

    served: Served

    def serve(self, due_ns: Nanoseconds, lanes: int) -> Served:
        self.served = super().serve(due_ns, lanes)
        return self.served


@dataclass(frozen=True)
class Row:
    """One utilisation. All times in milliseconds; the percentiles are the 99th of latency."""

    utilisation: float
    queries: int
    exact_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    deviation: float
    """Of measured from exact, as a share."""
    sampling_deviation: float
    """Standard deviation that this many queries give the figure, as a share: simulated."""
    constant_ms: float
    """By Lindley's recursion for the same arrivals, each query taking the calibrated service time."""
    actual_ms: float
    """The same, each query taking as long as it did."""
    harness_deviation: float
    """Of measured from actual, as a share."""
    constant: bool
    """The service was constant enough for the theory."""
    service_mean_ms: float
    service_max_ms: float
    effective_queries: float
    lateness_p99_ms: float
    valid: bool
    decides: bool
    """The service was constant and the harness not late."""
    closed_queries: int
    closed_ms: float
    """What the closed client reports on the first arrivals."""
    open_ms: float
    """What the harness reports on the same."""
    wrong_by: float
    """open / closed."""


def compare(
    session: RecordedSession, model: "ConstantService", utilisation: float, queries: int, service_ns: float, seed: int
) -> Row:
    """Measure at one utilisation, and hold it against the theory and the closed client."""
    rate_per_s = utilisation / service_ns * 1e9
    point = run_load(session, rate_per_s, queries=queries, seed=seed)
    assert point.p99_ms is not None
    due_ns = arrivals(rate_per_s, queries, seed)
    services_ns = session.served.done_ns - session.served.issued_ns
    constant_ms = p99(lindley(due_ns, np.full(queries, service_ns))) / 1e6
    actual_ms = p99(lindley(due_ns, services_ns)) / 1e6
    exact_ms = latency_quantile(0.99, utilisation) * service_ns / 1e6
    few = min(CLOSED_QUERIES, queries)
    closed_ms = p99(closed_client(model, due_ns[:few])) / 1e6
    open_ms = p99(np.array(point.latencies_ms[:few]))
    return Row(
        utilisation=utilisation,
        queries=queries,
        exact_ms=exact_ms,
        measured_ms=point.p99_ms.value,
        low_ms=point.p99_ms.low,
        high_ms=point.p99_ms.high,
        deviation=point.p99_ms.value / exact_ms - 1,
        sampling_deviation=sampling_deviation(utilisation, queries),
        constant_ms=constant_ms,
        actual_ms=actual_ms,
        harness_deviation=point.p99_ms.value / actual_ms - 1,
        constant=abs(actual_ms / constant_ms - 1) <= CONSTANT,
        service_mean_ms=services_ns.mean() / 1e6,
        service_max_ms=services_ns.max() / 1e6,
        effective_queries=point.effective_queries,
        lateness_p99_ms=point.lateness_p99_ms,
        valid=point.valid,
        decides=point.valid and abs(actual_ms / constant_ms - 1) <= CONSTANT,
        closed_queries=few,
        closed_ms=closed_ms,
        open_ms=open_ms,
        wrong_by=open_ms / closed_ms,
    )


def verdict(rows: Sequence[Row], utilisation: float) -> str:
    """What the attempts at one utilisation prove."""
    found = [row for row in rows if row.utilisation == utilisation and row.decides]
    if not found:
        return "undecided: the machine stopped the model or the harness in every attempt"
    return "holds" if abs(found[-1].deviation) <= TOLERANCE else "MISSED"


def table(rows: Sequence[Row], service_ms: float) -> Table:
    shown = Table(title=f"99th percentile of latency in ms, service of {service_ms:.4f} ms")
    for column in ("load", "queries", "exact", "measured", "off by", "sampling", "constant", "actual", "harness off"):
        shown.add_column(column, justify="right")
    for column in ("late p99", "longest", "closed client", "open, same", "wrong by", "decides"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.utilisation:g}",
            f"{row.queries:,}",
            f"{row.exact_ms:.3f}",
            f"{row.measured_ms:.3f}",
            f"{row.deviation:+.1%}",
            f"±{row.sampling_deviation:.1%}",
            f"{row.constant_ms:.3f}",
            f"{row.actual_ms:.3f}",
            f"{row.harness_deviation:+.1%}",
            f"{row.lateness_p99_ms:.3f}",
            f"{row.service_max_ms:.1f}",
            f"{row.closed_ms:.3f}",
            f"{row.open_ms:.3f}",
            f"{row.wrong_by:.1f}×",
            "yes" if row.decides else "no",
        )
    return shown


class ConstantService(NullSubject):
    """A model whose query takes the same time, come what may: it sleeps, and spins at the end."""

    def __init__(self, service_ns: int) -> None:
        self._service_ns = service_ns

    def query(self, index: int) -> None:  # noqa: ARG002
        end = time.perf_counter_ns() + self._service_ns
        if self._service_ns > SPIN_NS:
            time.sleep((self._service_ns - SPIN_NS) / 1e9)
        while time.perf_counter_ns() < end:
            pass

    def description(self) -> dict[str, Any]:
        return {"runtime": "sleep", "version": "", "device": "none"}


def closed_client(
    lane: Lane,
    due_ns: Nanoseconds,
    *,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> Nanoseconds:  # (queries,) -> (queries,)
    """The wrong client: it sends a query when it is due, but not before the last reply, and counts from there.

    The time that a query would have waited for the one before is left out ("coordinated omission", Gil Tene).
    """
    latencies = np.empty_like(due_ns)
    start = clock()
    for index, due in enumerate(due_ns.tolist()):
        while (left := start + due - clock()) > 0:
            if left > SPIN_NS:
                sleep((left - SPIN_NS) / 1e9)
        sent = clock()
        lane.query(index % lane.size)
        latencies[index] = clock() - sent
    return latencies


def lindley(due_ns: Nanoseconds, services_ns: Floats | Nanoseconds) -> Floats:  # (queries,), (queries,) -> (queries,)
    """Latencies of a queue with one lane: each query starts when it is due or when the last is done.

    Lindley's recursion, done_i = max(due_i, done_{i-1}) + service_i, unrolled into a running maximum.
    """
    done_if_busy = np.cumsum(services_ns)
    idle = np.maximum.accumulate(due_ns - (done_if_busy - services_ns))
    return np.asarray(done_if_busy + idle - due_ns, dtype=np.float64)


def waiting_probability(waiting: float, utilisation: float) -> Decimal:
    """P(W <= waiting) in the stationary queue M/D/1, with `waiting` in units of the service time.

    Erlang's formula (1909; Crommelin 1932 has it for more lanes):
    (1 - ρ) Σ_{k=0}^{⌊w⌋} (ρ (k - w))^k / k! · e^{ρ (w - k)}. Its terms alternate and grow exponentially with w before
    they cancel, so it is summed with 120 digits, which lasts to waits of a hundred services.
    """
    if waiting < 0:
        return Decimal(0)
    with localcontext() as context:
        context.prec = DIGITS
        load, wait = Decimal(utilisation), Decimal(waiting)
        total = (load * wait).exp()
        factorial = Decimal(1)
        for k in range(1, int(wait) + 1):
            factorial *= k
            step = load * (k - wait)
            total += step**k / factorial * (-step).exp()
        return +((1 - load) * total)


def latency_quantile(share: float, utilisation: float) -> float:
    """The latency that this share of queries does not exceed, in units of the service time: waiting and service."""
    low, high = 0.0, 1.0
    if waiting_probability(0.0, utilisation) >= Decimal(share):
        return 1.0
    while waiting_probability(high, utilisation) < Decimal(share):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if waiting_probability(middle, utilisation) < Decimal(share):
            low = middle
        else:
            high = middle
    return 1.0 + high


def sampling_deviation(utilisation: float, queries: int, runs: int = 200) -> float:
    """Standard deviation of the 99th percentile over simulated runs of this length, as a share of the exact one."""
    exact = latency_quantile(0.99, utilisation)
    unit = 1_000_000
    services = np.full(queries, unit)
    found = [p99(lindley(arrivals(1e9 * utilisation / unit, queries, seed), services)) for seed in range(1, runs + 1)]
    return float(np.std(found) / unit / exact)


def p99(values: Floats | Nanoseconds) -> float:
    return float(np.percentile(values, 99, method="averaged_inverted_cdf"))


if __name__ == "__main__":
    sys.exit(main())
