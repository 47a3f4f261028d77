"""The groups in their order, each within its share of the time that is left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu_suite.deadline import ending_workers
from benchmarks.gpu_suite.document import Collected, variant_name
from benchmarks.gpu_suite.groups import Group, Mode, Precision, shares
from benchmarks.gpu_suite.opening import open_file
from benchmarks.gpu_suite.opening_pytorch import open_checkpoint, warm_caches
from benchmarks.harness.conditions import Watch
from benchmarks.harness.measure import Measurement, measure
from benchmarks.harness.rounds import Plan
from benchmarks.harness.subject import Candidate
from compress.errors import first_line

ROUNDS_S = 6.0
"""Least time for the rounds of a group, once it is known how long its processes take to start."""

PATIENCE_S = 60.0
"""For what takes longer to start than was planned, at the cost of later groups."""

MOST_PROCESSES = 3


@dataclass
class Timing:
    """How groups are timed, and what was learnt of them on the way."""

    device: str
    threads: int
    pool: Path
    watch: Watch
    _start_s: dict[tuple[Mode, Precision | None], float] = field(default_factory=dict)
    """How long the processes of a group took until their first round was over."""

    def least_s(self, group: Group) -> float:
        known = self._start_s.get(self._like(group))
        return group.mode.least_s if known is None else known + ROUNDS_S

    def learn(self, group: Group, start_s: float) -> None:
        """It took so long until the first round was over, or longer, where there was none."""
        self._start_s[self._like(group)] = start_s

    def plan(self, group: Group, seconds: float) -> Plan:
        """As many processes of each network as start within half of the time."""
        start = self._start_s.get(self._like(group), max(1.0, group.mode.least_s - ROUNDS_S))
        return Plan(
            rounds=10,
            seconds=0.5,
            queries=20,
            warmup_s=0.05,
            time_budget_s=max(1.0, seconds),
            processes=max(1, min(MOST_PROCESSES, int(seconds / (2 * start)))),
        )

    @staticmethod
    def _like(group: Group) -> tuple[Mode, Precision | None]:
        """Groups start alike in one mode; of engines, those of each precision must first be built."""
        return group.mode, group.precision if group.mode.opens == "plan" else None


def time_groups(
    waiting: Sequence[Group],
    found: Collected,
    timing: Timing,
    *,
    left_s: Callable[[], float],
    on_group: Callable[[str], None],
) -> None:
    """Time as many groups as fit; after each, `on_group` is called with a sentence about it.

    Args:
        left_s: seconds until all groups must be done.
    """
    rest = list(waiting)
    broken: dict[tuple[Mode, Precision], str] = {}
    while rest:
        now_s = left_s()
        planned = shares(rest, now_s, timing.least_s)
        group = next((group for group in rest if group in planned), None)
        if group is None:
            break
        rest.remove(group)
        key = group.mode, group.precision
        if key in broken:
            found.leave_out(group, f"as at another batch size: {broken[key]}")
            continue
        failure = _time(group, planned[group], found, timing, left_s)
        if failure is not None:
            broken[key] = failure
        on_group(f"{group}: {_outcome(group, found)}")
    for group in rest:
        found.leave_out(group, "time")
    on_group(f"{len(rest)} groups were left out for lack of time")


def _time(group: Group, seconds: float, found: Collected, timing: Timing, left_s: Callable[[], float]) -> str | None:
    """Measure one group; why none of it could be measured, where the reason was not the time."""
    began_s = left_s()
    with ending_workers(min(began_s, seconds + PATIENCE_S)) as ended:
        candidates, names = _candidates(group, found, timing)
        baseline = variant_name("dense", group.mode, group.precision)
        if baseline not in names:
            missing = found.files.failures.get(("dense", group.mode.opens, group.precision))
            why = "time" if ended.is_set() else f"the dense network is missing: {missing or 'it was not made'}"
            found.leave_out(group, why)
            return None if ended.is_set() else why
        ready_s = left_s()  # engines are built once, and what follows is needed by every group
        if group.mode.warms:
            warm_caches(candidates)
        rounds_s = min(left_s(), max(seconds - (began_s - left_s()), ROUNDS_S))

        def on_round(done: int, _: float) -> None:
            if done == 1:
                timing.learn(group, ready_s - left_s())

        try:
            measurement: Measurement = measure(
                candidates,
                baseline=baseline,
                plan=timing.plan(group, rounds_s),
                watch=timing.watch,
                on_round=on_round,
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, other groups may work
            if ended.is_set():
                timing.learn(group, ready_s - left_s())
                found.leave_out(group, "time: its processes were ended before they had been measured")
                return None
            found.add_failure(group, names, why := f"{type(error).__name__}: {first_line(error)}")
            return why
    if ended.is_set():
        measurement = replace(measurement, failures=dict.fromkeys(measurement.failures, "the time was over"))
    found.add(group, names, measurement)
    return None


def _candidates(group: Group, found: Collected, timing: Timing) -> tuple[list[Candidate], dict[str, str]]:
    """What is measured together, and the network of each variant; files that are missing are recorded."""
    mode, precision = group.mode, group.precision
    candidates, names = [], {}
    for network in found.files.networks:
        artefact = found.files.artefact(network, mode.opens, precision)
        if artefact is None:
            found.fail(f"{mode.name}, {precision}, {network}", found.files.failures[network, mode.opens, precision])
            continue
        name = variant_name(network, mode, precision)
        names[name] = network
        arguments = {
            "artefact": str(found.files.path(artefact)),
            "pool": str(timing.pool),
            "batch_size": group.batch_size,
            "device": timing.device,
            "threads": timing.threads,
            "runtime": mode.runtime,
        }
        if mode.opens == "checkpoint":
            arguments["precision"] = precision
            candidates.append(Candidate(name, open_checkpoint, arguments, group.batch_size))
        else:
            candidates.append(Candidate(name, open_file, arguments, group.batch_size))
    return candidates, names


def _outcome(group: Group, found: Collected) -> str:
    """The medians of a group in words."""
    parts = []
    for network in found.files.networks:
        cell = found.cells.get((group.mode, group.precision, network))
        measured = None if cell is None else cell.measurements.get(group.batch_size)
        parts.append(f"{network} {'-' if measured is None else f'{measured.latency.median_ms.value:.3g} ms'}")
    return ", ".join(parts)
