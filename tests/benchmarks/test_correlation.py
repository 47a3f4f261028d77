"""Correlations against numbers by hand, against scipy on resamples written out, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.harness import correlation
from benchmarks.harness.correlation import Agreement, agreement
from benchmarks.harness.errors import HarnessInputError

COEFFICIENTS = ("pearson", "spearman", "kendall")
REFERENCE = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}

rng = np.random.default_rng(0)
TIED = rng.integers(4, size=30).astype(float), rng.integers(5, size=30).astype(float)
FREE = rng.normal(size=25), rng.normal(size=25)


def values(found: Agreement) -> tuple[float | None, ...]:
    return tuple(getattr(found, name).value for name in COEFFICIENTS)


# --- the values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        # deviations (-1.5, -0.5, 0.5, 1.5) and (-1.5, 0.5, -0.5, 1.5): 4 / 5; of 6 pairs one is discordant: 4 / 6
        ([1, 2, 3, 4], [1, 3, 2, 4], (0.8, 0.8, 2 / 3)),
        ([1, 2, 3, 4], [4, 3, 2, 1], (-1, -1, -1)),
        # deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6)
        ([1, 2, 3], [7, 7, 10], (np.sqrt(3) / 2, np.sqrt(3) / 2, np.sqrt(2 / 3))),
        # deviations (-.75, -.75, .25, 1.25) and (-1.25, -.25, .75, .75): 2.25 / 2.75; ranks (1.5, 1.5, 3, 4) and
        # (1, 2, 3.5, 3.5), deviations (-1, -1, .5, 1.5) and (-1.5, -.5, 1, 1): 4 / 4.5; of 6 pairs 4 are concordant,
        # one is tied in x and one in y: 4 / sqrt(5 * 5)
        ([1, 1, 2, 3], [1, 2, 3, 3], (9 / 11, 8 / 9, 0.8)),
        # ranks (1, 2.5, 2.5) and (1, 2, 3): deviations (-1, .5, .5), (-1, 0, 1): 1.5 / sqrt(1.5 * 2); 2 / sqrt(2 * 3)
        ([0, 1, 1], [5, 6, 7], (np.sqrt(3) / 2, np.sqrt(3) / 2, np.sqrt(2 / 3))),
        # the ends agree with nothing: symmetric in x, so 0
        ([-1, 0, 1], [1, 0, 1], (0, 0, 0)),
    ],
)
def test_by_hand(x: list[float], y: list[float], expected: tuple[float, float, float]) -> None:
    found = agreement(x, y)
    assert values(found) == pytest.approx(expected, abs=1e-12)
    assert found.samples == len(x)


@pytest.mark.parametrize(("x", "y"), [TIED, FREE, (FREE[0], TIED[0][:25])], ids=["tied", "free", "half tied"])
def test_values_are_scipys(x: np.ndarray, y: np.ndarray) -> None:
    assert values(agreement(x, y)) == pytest.approx([REFERENCE[name](x, y).statistic for name in COEFFICIENTS])


def test_a_score_agrees_with_itself_entirely() -> None:
    for x in (*TIED, *FREE):
        assert values(agreement(x, x)) == pytest.approx((1, 1, 1), abs=1e-15)
        assert values(agreement(x, -x)) == pytest.approx((-1, -1, -1), abs=1e-15)


# --- the intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [TIED, FREE, (TIED[0][:4], TIED[1][:4])], ids=["tied", "free", "four"])
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_interval_is_that_of_resamples_written_out(name: str, x: np.ndarray, y: np.ndarray) -> None:
    draws = np.random.default_rng(7).integers(len(x), size=(300, len(x)))
    written_out = [
        REFERENCE[name](x[draw], y[draw]).statistic for draw in draws if len(set(x[draw])) > 1 and len(set(y[draw])) > 1
    ]
    found = getattr(agreement(x, y, seed=7, resamples=300), name)
    low, high = np.percentile(written_out, [2.5, 97.5])
    assert found.low == pytest.approx(min(low, found.value), abs=1e-12)
    assert found.high == pytest.approx(max(high, found.value), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [TIED, FREE, (np.array([0.0, 0, 0, 1]), np.array([1.0, 2, 2, 0]))])
def test_kendall_of_all_resamples_at_once_is_scipys_of_each(x: np.ndarray, y: np.ndarray) -> None:
    draws = np.random.default_rng(1).integers(len(x), size=(200, len(x)))
    expected = [stats.kendalltau(x[draw], y[draw]).statistic for draw in draws]
    found = correlation._kendall(x, y, draws)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # NaN in the same places


def test_many_items_take_few_resamples_of_kendall_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = TIED
    together = agreement(x, y, seed=3, resamples=150)
    monkeypatch.setattr(correlation, "_PAIRS_AT_ONCE", 29)
    one_by_one = agreement(x, y, seed=3, resamples=150)
    assert one_by_one.kendall.model_dump() == pytest.approx(together.kendall.model_dump(), abs=1e-12)
    monkeypatch.setattr(correlation, "_RESAMPLES_OF_MANY", 20)
    few = agreement(x, y, seed=3, resamples=150)
    assert few.kendall.value == one_by_one.kendall.value
    assert few.kendall.model_dump() == pytest.approx(agreement(x, y, seed=3, resamples=20).kendall.model_dump())
    assert few.spearman == together.spearman


def test_more_than_3000_items() -> None:
    many = np.random.default_rng(2)
    x = many.normal(size=3001)
    y = x + many.normal(size=3001)
    found = agreement(x, y, resamples=20)
    assert values(found) == pytest.approx([REFERENCE[name](x, y).statistic for name in COEFFICIENTS])
    for name in COEFFICIENTS:
        coefficient = getattr(found, name)
        assert coefficient.low < coefficient.value < coefficient.high
        assert coefficient.high - coefficient.low < 0.08


def test_the_interval_repeats_by_seed_and_narrows_with_the_number_of_items() -> None:
    many = np.random.default_rng(4)
    x = many.normal(size=1000)
    y = x + many.normal(size=1000)
    assert agreement(x[:50], y[:50], seed=1) == agreement(x[:50], y[:50], seed=1)
    assert agreement(x[:50], y[:50], seed=1) != agreement(x[:50], y[:50], seed=2)
    for name in COEFFICIENTS:
        widths = []
        for items in (10, 100, 1000):
            found = getattr(agreement(x[:items], y[:items], resamples=400), name)
            widths.append(found.high - found.low)
        assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_resamples_in_which_a_score_does_not_vary_do_not_count() -> None:
    # Three times 0.1 has a mean that is not 0.1: what is left of it must not be correlated.
    x, y = np.array([0.1, 0.1, 0.1, 0.3]), np.array([0.1, 0.2, 0.3, 0.4])
    drawn = correlation._pearson(np.array([[0.1, 0.1, 0.1]]), np.array([[1.0, 2.0, 3.0]]))
    assert np.isnan(drawn).all()
    found = agreement(x, y, resamples=500)
    assert found.pearson.low is not None
    assert found.pearson.low > 0  # in every resample that varies, the 0.3 goes with the largest y


# --- what cannot be correlated --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1], [2]),
        ([1, 2], [1, 2]),
        ([1, 1, 1], [1, 2, 3]),
        ([1, 2, 3, 4], [0.1, 0.1, 0.1, 0.1]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_nothing_is_said_of_two_items_or_of_a_constant(x: list[float], y: list[float]) -> None:
    found = agreement(x, y)
    for name in COEFFICIENTS:
        assert getattr(found, name).model_dump() == {"value": None, "low": None, "high": None}
    assert found.samples == len(x)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([1, 2, 3], [1, 2], r"shape \(3,\) cannot be correlated with a truth of shape \(2,\)"),
        ([[1, 2, 3]], [[1, 2, 3]], r"shape \(1, 3\)"),
        (1.0, 2.0, r"shape \(\)"),
        ([1, float("nan"), 3], [1, 2, 3], "NaN or infinity"),
        ([1, 2, 3], [1, 2, float("inf")], "NaN or infinity"),
    ],
)
def test_what_cannot_be_correlated_is_one_sentence(x: object, y: object, sentence: str) -> None:
    with pytest.raises(HarnessInputError, match=sentence):
        agreement(x, y)  # type: ignore[arg-type]


# --- what must always hold ------------------------------------------------------------------------------------------

few = settings(deadline=None, max_examples=60, derandomize=True)
numbers = st.one_of(
    st.integers(-3, 3).map(float), st.floats(allow_nan=False, allow_infinity=False), st.floats(-1e-300, 1e-300)
)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=15)
small_pairs = st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=3, max_size=15)


@few
@given(pairs)
@pytest.mark.filterwarnings("error")
def test_values_lie_in_their_intervals_and_these_in_minus_1_to_1(items: list[tuple[float, float]]) -> None:
    x, y = zip(*items, strict=True)
    found = agreement(x, y, resamples=50)
    varies = len(x) >= 3 and len(set(x)) > 1 and len(set(y)) > 1
    for name in COEFFICIENTS:
        coefficient = getattr(found, name)
        assert (coefficient.value is not None) == varies
        if varies:
            assert -1 <= coefficient.low <= coefficient.value <= coefficient.high <= 1


@few
@given(pairs)
def test_it_is_symmetric(items: list[tuple[float, float]]) -> None:
    x, y = zip(*items, strict=True)
    one, other = agreement(x, y, resamples=50), agreement(y, x, resamples=50)
    for name in COEFFICIENTS:
        assert getattr(one, name).model_dump() == pytest.approx(getattr(other, name).model_dump(), abs=1e-12)


@few
@given(small_pairs, st.sampled_from([lambda v: v**3, lambda v: np.exp(v), lambda v: 5 * v - 2, lambda v: np.arctan(v)]))
def test_ranks_do_not_change_under_increasing_transformations(items: list[tuple[int, int]], transform: object) -> None:
    x, y = (np.array(part, dtype=float) for part in zip(*items, strict=True))
    plain = agreement(x, y, resamples=50)
    for moved in (agreement(transform(x), y, resamples=50), agreement(x, transform(y), resamples=50)):  # type: ignore[operator]
        assert (moved.spearman, moved.kendall) == (plain.spearman, plain.kendall)


@few
@given(small_pairs, st.integers(-40, 40), st.floats(0.1, 10))
def test_pearson_does_not_change_with_scale_and_offset(
    items: list[tuple[int, int]], exponent: int, offset: float
) -> None:
    x, y = (np.array(part, dtype=float) for part in zip(*items, strict=True))
    plain = agreement(x, y, resamples=50).pearson
    scaled = agreement(10.0**exponent * x, y + offset, resamples=50).pearson
    assert scaled.model_dump() == pytest.approx(plain.model_dump(), abs=1e-9)
