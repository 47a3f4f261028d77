"""Measuring: clocks, scenarios, statistics, environment, counters, report. Knows neither `compress` nor `deploy`."""

from benchmarks.harness.counters import macs, parameters
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.measure import Measured, Measurement, Variant, measure
from benchmarks.harness.report import report_html
from benchmarks.harness.results import (
    Accuracy,
    Artefact,
    BatchMeasurement,
    BudgetResult,
    LayerWidths,
    Pruning,
    PruningEvent,
    Results,
    Runtime,
    VariantResult,
    csv_text,
    load,
    rows,
)
from benchmarks.harness.statistics import Estimate, Speedup
from benchmarks.harness.tables import summary

__all__ = [
    "Accuracy",
    "Artefact",
    "BatchMeasurement",
    "BudgetResult",
    "Estimate",
    "HarnessError",
    "HarnessInputError",
    "LayerWidths",
    "Measured",
    "Measurement",
    "Pruning",
    "PruningEvent",
    "Results",
    "Runtime",
    "Speedup",
    "Variant",
    "VariantResult",
    "csv_text",
    "environment",
    "load",
    "macs",
    "measure",
    "parameters",
    "report_html",
    "rows",
    "summary",
]
