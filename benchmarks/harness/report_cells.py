"""What the report's tables are made of: a figure, and below it its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.harness import numerals
from benchmarks.harness.condition_records import Range
from benchmarks.harness.report_names import counted, display_names, place_of, series_of
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.statistics import Estimate


@dataclass(frozen=True)
class Cell:
    """A figure, and below it in small what belongs to it."""

    text: str
    small: str = ""
    style: str = ""
    """A class of the page, such as the verdict."""
    series: int | None = None
    """Of a variant: the colour that it has in the figures."""


@dataclass(frozen=True)
class Table:
    """Columns without any figure are left out."""

    columns: list[str]
    rows: list[list[Cell]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Cell | None]]) -> "Table | None":
        """From one mapping per row, all with the same columns; None of no rows."""
        columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
        return cls(columns, [[row[name] or Cell("n/a") for name in columns] for row in rows]) if columns else None


Rows = Iterator[dict[str, Cell | None]]
"""One mapping of columns to cells for each row; None where there is no figure."""


def named_variants(results: Results) -> list[tuple[VariantResult, Cell]]:
    """Each variant and the cell that names it, in the document's order."""
    cells = variant_cells(results)
    return [(variant, cells[id(variant)]) for variant in results.variants]


def variant_cells(results: Results) -> dict[int, Cell]:
    """id of a variant -> its name, with its colour, and below it where it ran."""
    series = series_of(results)
    return {
        id(variant): Cell(name, place_of(variant), series=series[id(variant)])
        for name, variant in zip(display_names(results), results.variants, strict=True)
    }


def estimated(estimate: Estimate) -> Cell:
    """A figure and its interval."""
    return Cell(numerals.value(estimate), numerals.interval(estimate))


def plain(number: float | None) -> Cell | None:
    """A figure without an interval."""
    return None if number is None else Cell(numerals.significant(number))


def several(values: Sequence[float]) -> Cell:
    """The median of a few processes, and between what they lay."""
    text = numerals.significant(median(values))
    low, high = numerals.significant(min(values)), numerals.significant(max(values))
    return Cell(text, f"{low} to {high}" if low != high else counted(len(values), "process"))


def ranged(found: Range | None) -> Cell | None:
    """The figure in the middle, and between what the others lay."""
    if found is None:
        return None
    low, middle, high = (_rounded(value) for value in (found.minimum, found.median, found.maximum))
    return Cell(middle, f"{low} to {high}" if low != high else "")


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
