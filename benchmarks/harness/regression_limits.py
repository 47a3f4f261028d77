"""What counts as a regression, as `--fail-on` takes it, and the judgement by it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.numerals import percent
from benchmarks.harness.regression_records import Cell, CellChange, Failure, Regression, VariantChange

EXAMPLE = "--fail-on slower:2%,accuracy:0.5"


@dataclass(frozen=True)
class Limits:
    """What may be lost. A failure of something that did not fail before is always a regression."""

    slower: float | None = None
    """Share by which a cell may be slower; None: any."""
    accuracy: float | None = None
    """Points of top-1 that a variant may lose; None: any."""


def read_limits(texts: Sequence[str]) -> Limits:
    """Read `slower:2%`, `accuracy:0.5` and `failed`, one by one or with commas between.

    Raises:
        HarnessInputError: something else is there, or one of them twice.
    """
    found: dict[str, float] = {}
    for item in (part.strip() for text in texts for part in text.split(",")):
        name, colon, amount = item.partition(":")
        if name == "failed" and not colon:
            continue
        if name not in ("slower", "accuracy"):
            raise HarnessInputError(
                f"--fail-on has {item!r}, which is none of slower:PERCENT%, accuracy:POINTS and failed: write for "
                f"instance {EXAMPLE}."
            )
        if name in found:
            raise HarnessInputError(f"--fail-on has {name} twice, and only one limit can hold: leave one.")
        found[name] = _slower(item, amount) if name == "slower" else _number(item, amount, "points, as in accuracy:0.5")
    return Limits(**found)


@dataclass(frozen=True)
class Judgement:
    """A comparison by limits."""

    limits: Limits
    cells: int
    """Compared."""
    slower: tuple[CellChange, ...]
    """By more than the limit, the whole interval; without a limit, all that are slower at all."""
    maybe: tuple[CellChange, ...]
    """By more than the limit, but not the whole interval, or within what the runs differ anyway."""
    accuracy: tuple[VariantChange, ...]
    unchecked: tuple[VariantChange, ...]
    """Without an accuracy in both documents, though there is a limit."""
    failed: tuple[Failure, ...]
    names: "Names"

    def problems(self) -> list[str]:
        """The regressions, one sentence each."""
        failed = [
            f"{self.names.failure(item)} failed in NEW and did not fail in OLD: {(item.new or '').rstrip('.')}."
            for item in self.failed
        ]
        slow = [] if self.limits.slower is None else [self._slower(change) for change in self.slower]
        return [*failed, *slow, *map(self._less_accurate, self.accuracy)]

    def sentence(self) -> str:
        """All of it in one sentence."""
        limit = "" if self.limits.slower is None else f" by more than {_percent(self.limits.slower)}"
        parts = []
        if self.slower:
            names = ", ".join(self.names.cell(change.cell) for change in self.slower)
            verb = "is" if len(self.slower) == 1 else "are"
            parts.append(f"{len(self.slower)} of {_counted(self.cells, 'cell')} {verb} slower{limit}: {names}")
        else:
            parts.append(f"no cell is slower{limit}" if self.cells else "no cell could be compared")
        if self.maybe:
            names = ", ".join(self.names.cell(change.cell) for change in self.maybe)
            parts.append(f"unclear, maybe: {names}")
        if self.accuracy:
            names = ", ".join(self.names.variant(item) for item in self.accuracy)
            parts.append(f"less accurate by more than {self.limits.accuracy:g} points: {names}")
        if self.failed:
            parts.append(f"failed: {', '.join(map(self.names.failure, self.failed))}")
        return "; ".join(parts) + "."

    def _slower(self, change: CellChange) -> str:
        name, limit = self.names.cell(change.cell), _percent(self.limits.slower or 0.0)
        if change.ratio is None:
            return f"{name} is slower than any limit: {change.note}."
        low, high = (100 * (1 / end - 1) for end in (change.ratio.high, change.ratio.low))
        return (
            f"{name} is slower by {percent(100 * (1 / change.ratio.value - 1))} [{low:.1f}, {high:.1f}], more than the "
            f"{limit} allowed."
        )

    def _less_accurate(self, change: VariantChange) -> str:
        return (
            f"{self.names.variant(change)} lost {-(change.top1_points or 0.0):.2f} points of {change.metric}, more "
            f"than the {self.limits.accuracy:g} allowed."
        )


def judge(regression: Regression, limits: Limits) -> Judgement:
    """Which changes go beyond the limits."""
    bound = 1 / (1 + (limits.slower or 0.0))
    slower = tuple(
        change
        for change in regression.cells
        if change.verdict == "slower" and (change.ratio is None or change.ratio.high < bound)
    )
    maybe = () if limits.slower is None else tuple(c for c in regression.cells if c.ratio and c.ratio.value < bound)
    points = [(variant, variant.top1_points) for variant in regression.variants]
    allowed = limits.accuracy
    return Judgement(
        limits=limits,
        cells=len(regression.cells),
        slower=slower,
        maybe=tuple(change for change in maybe if change not in slower),
        # A billionth of a point is what the arithmetic of percentages leaves.
        accuracy=tuple(v for v, lost in points if allowed is not None and lost is not None and -lost > allowed + 1e-9),
        unchecked=tuple(variant for variant, lost in points if allowed is not None and lost is None),
        failed=tuple(failure for failure in regression.failures if failure.regression),
        names=Names(regression),
    )


class Names:
    """Names of cells and variants, as short as they can be where all share a precision, a runtime or a device."""

    def __init__(self, regression: Regression) -> None:
        named: list[Cell | VariantChange | Failure] = [*regression.variants, *regression.failures]
        named += [*regression.only_old, *regression.only_new]
        self._all = [(item.precision, item.runtime, item.device) for item in named]

    def cell(self, cell: Cell) -> str:
        figure = [f"batch {cell.batch_size}"] if cell.batch_size is not None else []
        figure += [cell.scenario] if cell.scenario in ("Server", "Throughput") else []
        return f"{self.variant(cell)} {' '.join(figure)}"

    def variant(self, item: Cell | VariantChange | Failure) -> str:
        own = (item.precision, item.runtime, item.device)
        differing = [value for place, value in enumerate(own) if len({each[place] for each in self._all}) > 1]
        return " ".join((item.variant, *(value for value in differing if value not in item.variant)))

    def failure(self, failure: Failure) -> str:
        return self.variant(failure) + (f" at {failure.what}" if failure.what else "")


def _slower(item: str, amount: str) -> float:
    if not amount.endswith("%"):
        raise HarnessInputError(f"--fail-on has {item!r} without a percent sign: write slower:2%.")
    return _number(item, amount[:-1], "percent, as in slower:2%") / 100


def _number(item: str, text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise HarnessInputError(f"--fail-on has {item!r}, whose limit is no number of at least 0: write {what}.")
    return number


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
