"""The loop of rounds: every contestant once in each, one at a time, in processes that are replaced on the way."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from benchmarks.harness.conditions import Conditions, Watch
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.session import Clock, Memory, Nanoseconds, Opened, Session
from benchmarks.harness.subject import Stages

MIN_ROUNDS = 2
"""Below two rounds there is no interval."""

ROUNDS_AIMED_AT = 30
"""Into so many rounds the time is divided: what two turns share is the more, the closer they are, so many short rounds
tell more than a few long ones. In 50 s on two cores, ResNet-18 against itself: half width 0.6 % by 27 rounds of 0.3 s a
turn, 1.3 % by 9 rounds of 1 s."""

SHORTEST_TURN_S = 0.25
"""Where the time does not suffice for so many rounds of such turns, there are fewer rounds."""

WARM_SHARE = 0.2
"""Most of a turn that may go into warming."""

STAGED_QUERIES = 20
"""Queries of each process that are taken apart, after the timed ones."""

CHECK_EVERY = 1.1
"""Precision is looked at when the rounds have become so many times more: looking is work, and every look is a chance to
stop at a moment that only seems precise."""


@dataclass(frozen=True)
class Plan:
    """How long to measure. It ends when it is precise enough or when the time is over, whichever comes first."""

    rounds: int = 10
    """Complete rounds at least, where the time allows."""
    seconds: float = 1.0
    """Least time of a variant in a round, where the time allows for `ROUNDS_AIMED_AT` such rounds."""
    queries: int = 50
    """Least number of queries of a variant in a round, where the time allows for that."""
    warmup_s: float = 0.1
    """Time for which a variant is warmed before each round, one query at least."""
    time_budget_s: float = 60.0
    """For everything, starting the processes included."""
    half_width: float = 0.005
    """Precise enough: the half width of every ratio's interval, as a share of the ratio."""
    processes: int = 3
    """Fresh processes of each variant over which the rounds are spread."""
    idle_gap_s: float = 0.0
    """Before the one query of each process that shows what a pause costs; 0 leaves it out."""


@dataclass
class Record:
    """What one contestant gave."""

    rounds_ns: list[Nanoseconds] = field(default_factory=list)
    throttled_ns: list[Nanoseconds] = field(default_factory=list)
    """Of rounds that were run again, because the machine throttled."""
    conditions: list[Conditions] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    after_gap_ms: list[float] = field(default_factory=list)
    stages: list[Stages] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    description: dict[str, Any] | None = None
    failure: str | None = None


class Contest:
    """All contestants, what they gave so far, and when to stop."""

    def __init__(
        self,
        contestants: Sequence[tuple[str, Callable[[], Session]]],
        plan: Plan,
        *,
        precise: Callable[["Contest"], bool],
        seed: int,
        watch: Watch,
        on_round: Callable[[int, float], None] | None,
        clock: Clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.records = {name: Record() for name, _ in contestants}
        self.processes: list[int] = []
        self.order: list[tuple[str, ...]] = []
        self.reruns = 0
        self.stopped_by: Literal["precision", "time"] = "time"
        self._launches = dict(contestants)
        self._plan = plan
        self._precise = precise
        self._rng = np.random.default_rng(seed)
        self._watch = watch
        self._on_round = on_round
        self._clock = clock
        self._sleep = sleep
        self._begin = clock()
        self._query_ns: dict[str, float] = {}
        self._starts_left_s = 0.0
        self._warm_s = plan.warmup_s
        self._aimed = 0
        self._next_check = plan.rounds
        self._round_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return (self._clock() - self._begin) / 1e9

    def run(self) -> None:
        """Measure until it is precise or the time is over."""
        before_rounds_s = after_rounds_s = 0.0
        for process in range(self._plan.processes):
            began = self.elapsed_s
            least_s = before_rounds_s + self._round_s + after_rounds_s
            if began + least_s > self._plan.time_budget_s and len(self.processes) >= MIN_ROUNDS:
                break
            # Its share of the time that is left; what comes after its rounds is taken from it.
            until_s = began + (self._plan.time_budget_s - began) / (self._plan.processes - process) - after_rounds_s
            with self._sessions() as sessions:
                before_rounds_s = self.elapsed_s - began
                self._starts_left_s = (before_rounds_s + after_rounds_s) * (self._plan.processes - 1 - process)
                self._time_queries(sessions)
                self._rounds(sessions, process, until_s)
                rounds_ended = self.elapsed_s
                self._aftermath(sessions)
            after_rounds_s = self.elapsed_s - rounds_ended
            if not any(record.failure is None for record in self.records.values()):
                break

    def _rounds(self, sessions: dict[str, Session], process: int, until_s: float) -> None:
        """Rounds until all of them are precise enough, or another one would end after `until_s`."""
        plan, last = self._plan, self._plan.processes - 1
        least = math.ceil(plan.rounds * (process + 1) / plan.processes)
        while sessions:
            before = self.elapsed_s
            self._round(sessions, process)
            self._round_s = self.elapsed_s - before
            done = len(self.processes)
            if self._on_round is not None:
                self._on_round(done, self.elapsed_s)
            if done >= least and self._precise_now(last=process == last):
                self.stopped_by = "precision"
                return
            self.stopped_by = "time"
            if self.elapsed_s + self._round_s > until_s and done >= (MIN_ROUNDS if process == last else 1):
                return

    def _precise_now(self, *, last: bool) -> bool:
        done = len(self.processes)
        if last and done < self._next_check:
            return False
        self._next_check = math.ceil(done * CHECK_EVERY)
        return done >= MIN_ROUNDS and self._precise(self)

    @contextmanager
    def _sessions(self) -> Iterator[dict[str, Session]]:
        """A fresh session of everything that has not failed, open and warm; one that fails is left out."""
        sessions: dict[str, Session] = {}
        try:
            for name in self._shuffled([name for name, record in self.records.items() if record.failure is None]):
                sessions[name] = self._launches[name]()
            for name in list(sessions):
                with self._surviving(sessions, name):
                    sessions[name].started()
            for name in list(sessions):
                with self._surviving(sessions, name):
                    self.records[name].opened.append(sessions[name].ready())
            yield sessions
        finally:
            for session in sessions.values():
                session.close()

    @contextmanager
    def _surviving(self, sessions: dict[str, Session], name: str) -> Iterator[None]:
        """A contestant that fails leaves the contest; the others go on."""
        try:
            yield
        except HarnessError as error:
            self.records[name].failure = str(error)
            sessions.pop(name).close()

    def _time_queries(self, sessions: dict[str, Session]) -> None:
        for name in list(sessions):
            with self._surviving(sessions, name):
                self._query_ns[name] = sessions[name].warm(self._plan.warmup_s)

    def _queries(self, names: Sequence[str]) -> dict[str, int]:
        """Queries of the next round: as many as both minima ask for, fewer where the rounds would not fit the time.

        Planned anew for each round, as the machine may be busier than it was.
        """
        plan, query_ns = self._plan, self._query_ns
        left_s = plan.time_budget_s - self.elapsed_s - self._starts_left_s
        if not self._aimed:
            self._aimed = max(plan.rounds, min(ROUNDS_AIMED_AT, int(left_s / len(names) / SHORTEST_TURN_S)))
        round_s = left_s / max(1, self._aimed - len(self.processes))
        self._warm_s = max(0.0, min(plan.warmup_s, WARM_SHARE * round_s / len(names)))
        wanted = {name: max(plan.queries, math.ceil(plan.seconds * 1e9 / query_ns[name])) for name in names}
        warm_s = sum(max(self._warm_s, query_ns[name] / 1e9) for name in names)
        timed_s = sum(count * query_ns[name] for name, count in wanted.items()) / 1e9
        share = min(1.0, max(0.0, round_s - warm_s) / timed_s)
        return {name: max(1, math.floor(count * share)) for name, count in wanted.items()}

    def _round(self, sessions: dict[str, Session], process: int) -> None:
        """One complete round; once more if the machine throttled, while there are not more reruns than rounds asked."""
        while True:
            order = self._shuffled(list(sessions))
            queries = self._queries(order)
            taken: dict[str, tuple[Nanoseconds, Conditions]] = {}
            for name in order:
                with self._surviving(sessions, name):
                    sessions[name].warm(self._warm_s)
                    taken[name] = self._timed(sessions[name], queries[name])
                    self._query_ns[name] = max(1.0, float(np.median(taken[name][0])))
            if self.reruns < self._plan.rounds and any(seen.throttled for _, seen in taken.values()):
                self.reruns += 1
                for name, (latencies, seen) in taken.items():
                    self.records[name].throttled_ns.append(latencies)
                    self.records[name].conditions.append(seen)
                continue
            for name, (latencies, seen) in taken.items():
                self.records[name].rounds_ns.append(latencies)
                self.records[name].conditions.append(seen)
            self.order.append(tuple(order))
            self.processes.append(process)
            return

    def _timed(self, session: Session, queries: int) -> tuple[Nanoseconds, Conditions]:
        cpu_s = 0.0
        self._watch.start()
        try:
            timed = session.time(queries)
            cpu_s = timed.cpu_s
        finally:
            conditions = self._watch.stop(own_cpu_s=cpu_s)
        return timed.latencies_ns, conditions

    def _aftermath(self, sessions: dict[str, Session]) -> None:
        """What each process tells once its rounds are done: a query after a pause, stages, memory."""
        for name in list(sessions):
            with self._surviving(sessions, name):
                session, record = sessions[name], self.records[name]
                if self._plan.idle_gap_s > 0:
                    self._sleep(self._plan.idle_gap_s)
                    record.after_gap_ms.append(float(session.time(1).latencies_ns[0]) / 1e6)
                if session.stages(1)[0].compute_ms is not None:
                    record.stages.extend(session.stages(STAGED_QUERIES))
                record.memory.append(session.memory())
                if record.description is None:
                    record.description = session.describe()

    def _shuffled(self, names: list[str]) -> list[str]:
        return [names[index] for index in self._rng.permutation(len(names))]
