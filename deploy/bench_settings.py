"""What is measured of the targets, and how the command line's words for it are read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.harness.rounds import Plan
from compress.errors import InputError

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
    if limit_ms is not None and not 0 < limit_ms < math.inf:
        raise InputError(f"--limit is {limit_ms:g}: give a positive number of milliseconds.")
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
