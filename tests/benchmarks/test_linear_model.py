"""Risk of a pruned linear model: the theory against known limits and sampling, the simulation against the theory."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.studies.linear_model import KEPT, fit, simulate
from benchmarks.studies.linear_theory import CRITERIA, Limit, excess_of_fit, limit, lognormal, risk

KAPPA = st.one_of(st.floats(0.02, 0.97), st.floats(1.03, 30))
SIGMA = st.floats(0, 5)
SPREAD = st.floats(0, 3)
SHARE = st.floats(0.01, 1)


def sampled_risk(law: Limit, kept: float, criterion: str, draws: int = 2_000_000) -> float:
    """The theorem's expectations by drawing Λ, B and H."""
    rng = np.random.default_rng(0)
    index = rng.choice(len(law.spectrum.values), draws, p=law.spectrum.weights)
    values = law.spectrum.values[index]
    b = rng.standard_normal(draws)
    x = law.kept_signal[index] * b + law.noise[index] * rng.standard_normal(draws)
    scores = {"magnitude": abs(x), "hessian": np.sqrt(values) * abs(x), "oracle": np.sqrt(values) * abs(b)}[criterion]
    kept_x = x * (scores >= np.quantile(scores, 1 - kept))
    return law.sigma**2 + np.mean(values * (b - kept_x) ** 2)


@pytest.mark.parametrize("kappa", [0.3, 3.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_closed_forms_equal_the_sampled_expectations(kappa, criterion):
    law = limit(lognormal(0.8), kappa, 0.5)
    assert risk(law, 0.3, criterion) == pytest.approx(sampled_risk(law, 0.3, criterion), rel=5e-3)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 0.9])
def test_unpruned_least_squares_has_its_known_risk(kappa):
    assert risk(limit(lognormal(1.2), kappa, 0.7), 1.0, "magnitude") == pytest.approx(0.49 / (1 - kappa), rel=1e-9)


def test_unpruned_interpolation_of_isotropic_features_has_its_known_risk():
    # Hastie et al. 2019, arXiv 1903.08560, theorem 1: bias r²(1 − 1/κ), variance σ² / (κ − 1)
    kappa, sigma = 3.0, 0.5
    expected = sigma**2 + (1 - 1 / kappa) + sigma**2 / (kappa - 1)
    assert risk(limit(lognormal(0), kappa, sigma), 1.0, "magnitude") == pytest.approx(expected, rel=1e-9)


@given(kappa=st.floats(1.03, 30), sigma=SIGMA, spread=SPREAD)
def test_the_fixed_point_equation_holds(kappa, sigma, spread):
    law = limit(lognormal(spread), kappa, sigma)
    assert law.spectrum.mean(law.kept_signal) == pytest.approx(1 / kappa, rel=1e-8)


@given(kappa=KAPPA, sigma=SIGMA, kept=SHARE)
def test_equal_variances_make_magnitude_and_hessian_the_same(kappa, sigma, kept):
    law = limit(lognormal(0), kappa, sigma)
    assert risk(law, kept, "magnitude") == pytest.approx(risk(law, kept, "hessian"), rel=1e-9)


@given(kappa=KAPPA, sigma=SIGMA, spread=SPREAD, kept=SHARE)
def test_hessian_is_never_worse_where_the_fit_is_of_use(kappa, sigma, spread, kept):
    law = limit(lognormal(spread), kappa, sigma)
    assume(excess_of_fit(law) < 0.9)
    assert risk(law, kept, "hessian") <= risk(law, kept, "magnitude") * (1 + 1e-9)


def test_hessian_can_be_worse_where_the_fit_is_worse_than_nothing():
    law = limit(lognormal(1.2), 1.05, 1.0)
    assert excess_of_fit(law) > 1
    assert risk(law, 0.3, "hessian") > 1.05 * risk(law, 0.3, "magnitude")


def test_an_infinite_risk_is_refused():
    with pytest.raises(ValueError, match="infinite at kappa = 1"):
        limit(lognormal(1), 1, 0.5)


def test_fit_by_hand():
    wide = np.array([[3.0, 4.0]])
    assert fit(wide, np.array([5.0])) == pytest.approx([0.6, 0.8])  # the shortest w with 3w₁ + 4w₂ = 5
    tall = np.array([[1.0], [1.0]])
    assert fit(tall, np.array([1.0, 3.0])) == pytest.approx([2.0])


@pytest.mark.parametrize("kappa", [0.5, 4.0])
def test_finite_models_follow_the_theory(kappa):
    law = limit(lognormal(1.2), kappa, 0.5)
    simulated = np.mean([simulate(kappa, 256, seed) for seed in range(40)], axis=0)
    expected = [[risk(law, kept, criterion) for kept in KEPT] for criterion in CRITERIA]
    assert simulated == pytest.approx(np.array(expected), rel=0.06)
