"""How well one score ranks like another: Pearson, Spearman and Kendall, each with a bootstrap interval.

Pearson: linear correlation of the values. Spearman: Pearson of the ranks, ties sharing their mean rank. Kendall: tau-b.
Intervals are 95 % percentile-bootstrap intervals over the items (channels), deterministic by seed: an item is drawn
with both of its scores.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.statistics import CONFIDENCE, Floats

RESAMPLES: Final = 1000

_PAIRS_AT_ONCE: Final = 3000
"""Up to so many items Kendall's tau of all resamples comes from one matrix of pairs; above, from fewer resamples."""

_RESAMPLES_OF_MANY: Final = 200


class Correlation(BaseModel):
    """One coefficient with its 95 % interval; all None over fewer than 3 items, or where one score does not vary."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float | None = Field(ge=-1, le=1)
    low: float | None = Field(ge=-1, le=1)
    high: float | None = Field(ge=-1, le=1)


class Agreement(BaseModel):
    """How one score agrees with another over `samples` items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pearson: Correlation
    spearman: Correlation
    kendall: Correlation
    samples: int


def agreement(scores: npt.ArrayLike, truth: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Agreement:
    """Correlate two scores of the same items.

    Args:
        scores, truth: (n,) finite numbers.
        resamples: bootstrap resamples; Kendall's interval over more than 3,000 items takes at most 200.

    Raises:
        HarnessInputError: the lengths differ, or a number is not finite.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise HarnessInputError(f"scores of shape {x.shape} cannot be correlated with a truth of shape {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise HarnessInputError("scores that are to be correlated hold NaN or infinity.")
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        nothing = Correlation(value=None, low=None, high=None)
        return Agreement(pearson=nothing, spearman=nothing, kendall=nothing, samples=len(x))
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    ranked_x, ranked_y = stats.rankdata(x), stats.rankdata(y)
    return Agreement(
        pearson=_estimate(_pearson(x[None], y[None])[0], _pearson(x[draws], y[draws])),
        spearman=_estimate(
            _pearson(ranked_x[None], ranked_y[None])[0],
            _pearson(stats.rankdata(x[draws], axis=1), stats.rankdata(y[draws], axis=1)),
        ),
        kendall=_estimate(float(stats.kendalltau(x, y).statistic), _kendall(ranked_x, ranked_y, draws)),
        samples=len(x),
    )


def _pearson(x: Floats, y: Floats) -> Floats:
    """(resamples, n) each -> (resamples,); NaN where a resample does not vary."""
    x, y = _deviations(x), _deviations(y)
    return (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))


def _deviations(values: Floats) -> Floats:
    """(resamples, n), less their mean and over a power of 2, so that no square overflows or vanishes.

    NaN where nothing varies: equal numbers have a mean that differs from them in the last bit.
    """
    _, exponents = np.frexp(np.abs(values).max(axis=1, keepdims=True))
    scaled = np.ldexp(values, -exponents)
    scaled -= scaled.mean(axis=1, keepdims=True)
    scaled[values.min(axis=1) == values.max(axis=1)] = np.nan
    return scaled


def _kendall(x: Floats, y: Floats, draws: npt.NDArray[np.int64]) -> Floats:
    """(resamples,): tau-b of each resample.

    With w_i the number of times that item i was drawn, concordant less discordant pairs are ½ Σ_ij w_i w_j s_ij, where
    s_ij is the product of the signs of the two differences; an item drawn twice is a pair tied with itself.
    """
    if len(x) > _PAIRS_AT_ONCE:
        some = draws[:_RESAMPLES_OF_MANY]
        return np.array([stats.kendalltau(x[draw], y[draw]).statistic for draw in some])
    counts = np.stack([np.bincount(draw, minlength=len(x)) for draw in draws]).astype(np.float64)
    signs_x = np.sign(x[:, None] - x[None]).astype(np.float64)
    signs_y = np.sign(y[:, None] - y[None]).astype(np.float64)

    def pairs(matrix: Floats) -> Floats:
        return np.einsum("rn,rn->r", counts @ matrix, counts)

    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs(signs_x * signs_y) / np.sqrt(pairs(np.abs(signs_x)) * pairs(np.abs(signs_y)))


def _estimate(value: float, resampled: Floats) -> Correlation:
    """The interval over those resamples in which both scores vary; it holds the value itself."""
    varying = resampled[np.isfinite(resampled)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(varying, [tail, 100 - tail]) if len(varying) else (value, value)
    within: Any = np.clip([value, min(low, value), max(high, value)], -1, 1)
    return Correlation(value=float(within[0]), low=float(within[1]), high=float(within[2]))
