"""Risk of a pruned linear model in the proportional limit p, n -> infinity with p/n = κ, as one-dimensional integrals.

Data: y = xᵀβ + σ·noise, features x ~ N(0, diag(Λ)), coefficients β = B/√p with B ~ N(0, 1) independent of Λ. The
model is fitted by least squares (κ < 1) or as the interpolator of least norm (κ > 1). Then √p times a fitted
coefficient behaves as X = aB + cH with H ~ N(0, 1) independent of (Λ, B), where a and c depend on Λ (`limit`), and the
risk after keeping the share s of the coefficients with the highest scores, without refitting, is

    σ² + E[Λ (B − X·1{score ≥ t_s})²],      t_s the (1 − s)-quantile of the scores.

Li et al. 2020, arXiv 2006.10903, in the form of theorem 1 of Chang et al. 2020, arXiv 2012.08749. Given Λ, (B, X) is
Gaussian, so that the expectations over B and H are closed forms and only the one over Λ is left to quadrature.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """A distribution of feature variances Λ: `values` with probabilities `weights`, both (m,)."""

    values: Array
    weights: Array

    def mean(self, function: Array) -> float:
        """E[f(Λ)] of a function given at `values`."""
        return float(self.weights @ function)


def lognormal(spread: float) -> Spectrum:
    """Λ = exp(τZ − τ²/2) with Z ~ N(0, 1) and τ = `spread`, so that E[Λ] = 1; 0 makes all features alike."""
    z = np.linspace(-8, 8, 801)  # equal steps integrate a smooth function against the normal density to rounding
    weights = norm.pdf(z) / norm.pdf(z).sum()
    return Spectrum(np.exp(spread * z - spread**2 / 2), weights)


@dataclass(frozen=True)
class Limit:
    """The law of √p times a fitted coefficient: X = aB + cH, a = `kept_signal` and c = `noise`, each (m,) over Λ."""

    spectrum: Spectrum
    sigma: float
    kept_signal: Array
    noise: Array

    @property
    def deviation(self) -> Array:
        """Standard deviation of X given Λ, (m,)."""
        return np.hypot(self.kept_signal, self.noise)


def limit(spectrum: Spectrum, kappa: float, sigma: float) -> Limit:
    """The fitted coefficients at κ = p/n features per example and noise of standard deviation σ.

    κ < 1: a = 1, c = σ √(κ / (1 − κ)) Λ^(−1/2).
    κ > 1: ξ solves E[1 / (1 + (ξΛ)⁻¹)] = 1/κ; then a = 1 − 1/(1 + ξΛ), c = √(κγ) Λ^(−1/2) a with
    γ = (σ² + E[Λ / (1 + ξΛ)²]) / (1 − κ E[a²]).

    Raises:
        ValueError: κ = 1, where the risk is infinite.
    """
    if kappa == 1:
        raise ValueError("The risk is infinite at kappa = 1.")
    if kappa < 1:
        noise = sigma * np.sqrt(kappa / (1 - kappa) / spectrum.values)
        return Limit(spectrum, sigma, np.ones_like(spectrum.values), noise)
    log_values = np.log(spectrum.values)
    log_xi = brentq(lambda x: spectrum.mean(expit(x + log_values)) - 1 / kappa, -100, 100)
    kept = expit(log_xi + log_values)  # = 1 / (1 + (ξΛ)⁻¹)
    bias = spectrum.mean(spectrum.values * (1 - kept) ** 2)
    gamma = (sigma**2 + bias) / (1 - kappa * spectrum.mean(kept**2))
    return Limit(spectrum, sigma, kept, np.sqrt(kappa * gamma / spectrum.values) * kept)


# Standard deviation, given Λ, of each criterion's score: |X|, √Λ |X|, √Λ |B|.
CRITERIA: dict[str, Callable[[Limit], Array]] = {
    "magnitude": lambda limit: limit.deviation,
    "hessian": lambda limit: np.sqrt(limit.spectrum.values) * limit.deviation,
    "oracle": lambda limit: np.sqrt(limit.spectrum.values),
}


def risk(limit: Limit, kept: float, criterion: str) -> float:
    """Expected squared error on a new example after the share `kept` (0 < s <= 1) with the highest scores stays.

    Args:
        criterion: `magnitude` |X|, `hessian` √Λ |X|, or `oracle` √Λ |B|, which knows the true coefficients.
    """
    spectrum, signal = limit.spectrum, limit.kept_signal
    cut = _threshold(spectrum, CRITERIA[criterion](limit), kept)  # (m,) in standard deviations of the score
    share = 2 * norm.sf(cut)  # P(|Z| >= u)
    moment = share + 2 * cut * norm.pdf(cut)  # E[Z²; |Z| >= u]
    # E[BX; kept] is a·moment, whether B or X decides, for they correlate only through aB.
    square = signal**2 * moment + limit.noise**2 * (share if criterion == "oracle" else moment)
    return limit.sigma**2 + spectrum.mean(spectrum.values * (1 - 2 * signal * moment + square))


def excess_of_fit(limit: Limit) -> float:
    """Risk of the unpruned fit above the noise, relative to E[Λ], that of the zero model."""
    return (risk(limit, 1.0, "magnitude") - limit.sigma**2) / limit.spectrum.mean(limit.spectrum.values)


def _threshold(spectrum: Spectrum, deviation: Array, kept: float) -> Array:
    """t_s / deviation(Λ), where a score of N(0, deviation²) exceeds t_s in absolute value with probability `kept`."""
    if kept == 1:
        return np.zeros_like(deviation)
    log_deviation = np.log(deviation)

    def share_above(log_threshold: float) -> float:
        return spectrum.mean(2 * norm.sf(np.exp(log_threshold - log_deviation)))

    low, high = log_deviation.min() - 40, log_deviation.max() + 5
    return np.exp(brentq(lambda x: share_above(x) - kept, low, high) - log_deviation)
