"""How Triton joins requests into batches, from the measured throughput curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.harness import numerals
from benchmarks.harness.cells import BatchMeasurement

NEAR_PEAK: Final = 0.95
"""A size is preferred only if it gives at least this fraction of the highest throughput measured."""

WAIT_FRACTION: Final = 0.1
"""A request waits for others at most this fraction of the time that the smallest preferred batch takes."""


@dataclass(frozen=True)
class Batching:
    """Settings of Triton's dynamic batcher."""

    dynamic: bool
    """Whether requests are joined at all."""
    preferred_sizes: tuple[int, ...]
    """Ascending; empty leaves Triton's default, the largest batch allowed."""
    max_queue_delay_us: int
    """Microseconds that the first request of a batch waits for others."""
    reason: str

    def warmup_sizes(self, max_batch: int) -> tuple[int, ...]:
        """Batch sizes that the server runs once before it takes requests: those that it will build most often."""
        return tuple(sorted({1, *((self.preferred_sizes or (max_batch,)) if self.dynamic else ())}))


def batching(measurements: Sequence[BatchMeasurement], max_batch: int) -> Batching:
    """What the measurements at batch sizes up to `max_batch` ask for.

    Where single images are fastest, requests are not joined. Else a size is preferred if its throughput is higher than
    that of every smaller size and at least `NEAR_PEAK` of the highest. The second condition is for the batcher's sake:
    it cuts whatever waits down to the largest preferred size that fits (triton-inference-server/core,
    src/dynamic_batch_scheduler.cc), so a small size of middling throughput would only break up better batches. Requests
    wait for others only where a batch gives clearly more than single images.
    """
    if max_batch == 1:
        return Batching(False, (), 0, "requests are not joined: the largest batch allowed is 1")
    throughputs: dict[int, float] = {}
    latencies_ms: dict[int, float] = {}
    for measured in measurements:
        size, throughput = measured.batch_size, measured.throughput_per_s.value
        if size <= max_batch and throughput > throughputs.get(size, 0.0):
            throughputs[size], latencies_ms[size] = throughput, measured.latency.median_ms.value
    if not set(throughputs) - {1}:
        return Batching(
            True,
            (),
            0,
            f"no batch size between 2 and {max_batch} was timed, so requests are joined as they come, without waiting",
        )
    peak = max(throughputs.values())
    preferred: list[int] = []
    highest = 0.0
    for size in sorted(throughputs):
        if throughputs[size] > highest:
            highest = throughputs[size]
            if highest >= NEAR_PEAK * peak:
                preferred.append(size)
    timed = ", ".join(f"{numerals.significant(throughputs[size], 4)} at {size}" for size in sorted(throughputs))
    if throughputs.get(1) == peak:
        return Batching(False, (), 0, f"requests are not joined: single images are fastest (images/s: {timed})")
    sizes = tuple(size for size in preferred if size > 1)  # a batch of one is none
    # Where single images come near the peak, company is welcome but not worth waiting for.
    wait = 0 if 1 in preferred else round(1000 * WAIT_FRACTION * latencies_ms[sizes[0]])
    return Batching(True, sizes, wait, f"images/s measured: {timed}")
