"""What several clocks read of the same things, held against each other and each against itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.harness.ratios import paired_speedup
from benchmarks.harness.statistics import CONFIDENCE, median_estimate

REPORTED = {"harness": "median", "torch.Timer": "median", "timm": "mean", "ort.profiler": "median"}
"""What each clock gives as its figure, where it gives one; ONNX Runtime's record has single runs."""


class Reading(NamedTuple):
    """What one clock read once."""

    median_ms: float
    mean_ms: float
    queries: int

    @classmethod
    def of(cls, latencies_ms: npt.ArrayLike) -> "Reading":
        taken = np.asarray(latencies_ms, dtype=np.float64)
        return cls(float(np.median(taken)), float(np.mean(taken)), taken.size)


def figures(clock: str, readings: Sequence[Reading], ours: Sequence[Reading], seed: int) -> dict[str, Any]:
    """A clock's figures over the repeats, held against itself and, repeat by repeat, against the harness."""
    result: dict[str, Any] = {"reports": REPORTED[clock], "readings": [reading._asdict() for reading in readings]}
    for kind in ("median", "mean"):
        taken, reference = ([[getattr(reading, f"{kind}_ms")] for reading in of] for of in (readings, ours))
        over = median_estimate(taken, seed=seed)
        result[f"{kind}_ms"] = over.model_dump()
        result[f"{kind}_repeatability"] = repeatability([value for (value,) in taken])
        if clock != "harness":
            harness = median_estimate(reference, seed=seed)
            ratio = paired_speedup(taken, reference, baseline="harness", seed=seed)
            result[f"{kind}_over_harness"] = ratio.model_dump(include={"value", "low", "high", "samples"})
            result[f"{kind}_agrees"] = over.low <= harness.high and harness.low <= over.high
            result[f"{kind}_equivalent"] = ratio.verdict == "equivalent"
    return result


def repeatability(values: Sequence[float]) -> dict[str, float | int]:
    """How far one reading of the same thing lies from the next, in percent: A/A.

    The median distance, and the range that holds the middle 95 % of the differences with their signs.
    """
    series = np.asarray(values, dtype=np.float64)
    percent = 100 * (series[1:] / series[:-1] - 1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(percent, [tail, 100 - tail])
    return {
        "median_percent": float(np.median(np.abs(percent))),
        "low_percent": float(low),
        "high_percent": float(high),
        "pairs": int(percent.size),
    }


def statements(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What was found, a line for each clock; every clock is judged by its medians."""
    lines = []
    for threads, networks in found.items():
        for network, clocks in networks.items():
            for clock, result in sorted(clocks.items(), key=lambda item: item[0] != "harness"):
                over, itself = result["median_ms"], result["median_repeatability"]
                line = (
                    f"{threads} threads, {network}, {clock}: {over['value']:.4g} ms "
                    f"[{over['low']:.4g}, {over['high']:.4g}]; to itself {itself['median_percent']:.2g} % "
                    f"[{itself['low_percent']:+.2g}, {itself['high_percent']:+.2g}]"
                )
                if clock != "harness":
                    ratio = result["median_over_harness"]
                    line += (
                        f"; {ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}] of ours, "
                        f"{'agrees' if result['median_agrees'] else 'does not agree'}"
                    )
                lines.append(line)
    return lines
