"""Writing figures for people: as many digits as their interval supports, and the unit beside them."""

import math

from benchmarks.harness.statistics import Estimate


def compact(number: float) -> str:
    """A count with a metric prefix: 269722 -> '269.7 k'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{significant(number / factor, 4)} {prefix}"
    return f"{number:g}"


def size(number_bytes: int) -> str:
    """A file size in decimal units: 1080000 -> '1.08 MB'."""
    text = compact(number_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def significant(number: float, digits: int = 3) -> str:
    """A number with this many significant digits, never in exponent form and with thousands set apart."""
    if number == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(decimals, 6)}f}"


def decimals(estimate: Estimate) -> int:
    """Decimals worth writing: the interval's width shows at least one digit and at most two."""
    width = estimate.high - estimate.low
    if width <= 0:
        return 0 if estimate.value == 0 else max(0, 2 - math.floor(math.log10(abs(estimate.value))))
    return min(4, max(0, -math.floor(math.log10(width / 2))))


def value(estimate: Estimate) -> str:
    """The figure alone: '0.512'."""
    return f"{estimate.value:,.{decimals(estimate)}f}"


def interval(estimate: Estimate) -> str:
    """The interval alone: '[0.508, 0.517]'."""
    places = decimals(estimate)
    return f"[{estimate.low:,.{places}f}, {estimate.high:,.{places}f}]"


def ratio(number: float) -> str:
    """A ratio: '1.62×'; two decimals below ten, two digits below 0.1."""
    return f"{_ratio(number)}×"


def ratio_interval(estimate: Estimate) -> str:
    """The interval of a ratio: '[1.58, 1.66]'."""
    return f"[{_ratio(estimate.low, 2)}, {_ratio(estimate.high, 2)}]"


def _ratio(number: float, decimals_above_ten: int = 1) -> str:
    if 0 < number < 0.1:
        return significant(number, 2)
    return f"{number:.2f}" if number < 10 else f"{number:.{decimals_above_ten}f}"


def percent(number: float) -> str:
    """A percentage with one decimal: '98.9 %'."""
    return f"{number:.1f} %"


def percent_interval(estimate: Estimate) -> str:
    """The interval of a percentage: '[97.6, 99.7]'."""
    return f"[{estimate.low:.1f}, {estimate.high:.1f}]"
