"""What can be timed: a subject answers queries on lanes. It is made inside the process that times it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Stages:
    """One query, taken apart. Host stamps are of one monotonic clock, `time.perf_counter_ns`.

    Device durations come from the device's own events; they are None where host and device are the same.
    """

    issued_ns: int
    """The query was handed to the runtime."""
    enqueued_ns: int
    """The runtime had taken it: all its work was in the device's queue. On a CPU, where work is done at once, the
    same as `issued_ns`."""
    done_ns: int
    """The outputs were complete in host memory."""
    h2d_ms: float | None = None
    compute_ms: float | None = None
    d2h_ms: float | None = None


class Lane(Protocol):
    """One stream of execution with its own buffers; several lanes of a subject work at the same time, each in a
    thread of its own."""

    @property
    def size(self) -> int:
        """Number of different inputs, at least 1."""
        ...

    def query(self, index: int) -> None:
        """Answer one query on input `index`, 0 <= index < size: from host memory to outputs in host memory.

        Called millions of times between two clock readings: nothing is checked, measured or allocated here."""
        ...

    def stages(self, index: int) -> Stages:
        """The same query, taken apart; slower than `query`."""
        ...


class Subject(Protocol):
    """One opened artefact at one batch size."""

    def prepare(self) -> None:
        """Bring the inputs into memory. It is the harness's own work, done once and in no figure."""
        ...

    def lane(self) -> Lane:
        """A new lane; the pool of inputs may be shared between lanes."""
        ...

    def description(self) -> dict[str, Any]:
        """What runs, ready for JSON, with the keys runtime, version, device and what proves them."""
        ...

    def close(self) -> None:
        """Release everything; lanes cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A subject that is still to be opened, in a process of its own.

    `open(**arguments)` must be a function that another process can import by its module and name, and the
    arguments must be picklable; it does no work that a service would not do at its start, since its duration is the
    load time.
    """

    name: str
    open: Callable[..., Subject]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
