"""Statistics against numbers worked out by hand, against brute force, and against what must always hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from benchmarks.harness import ratios, statistics
from benchmarks.harness.errors import HarnessInputError

latencies = st.lists(st.lists(st.floats(0.01, 1000, allow_nan=False), min_size=1, max_size=12), min_size=2, max_size=6)


def test_median_is_the_middle_or_the_mean_of_the_two_middle():
    assert statistics.median([3, 1, 2]) == 2
    assert statistics.median([4, 1, 2, 3]) == 2.5


def test_percentile_by_hand():
    # 1..65: 58.5 samples must not exceed it, so it is the 59th; 1..70: exactly the 63rd, averaged with the 64th
    assert statistics.percentile(range(1, 66), 90) == 59
    assert statistics.percentile(range(1, 71), 90) == 63.5


@pytest.mark.parametrize("percent", statistics.SAMPLES_NEEDED)
def test_percentile_only_where_the_samples_carry_it(percent):
    needed = statistics.SAMPLES_NEEDED[percent]
    assert statistics.percentile(range(needed - 1), percent) is None
    assert statistics.percentile(range(needed), percent) is not None
    # LoadGen's criterion: the smallest n at which at most one sample beyond the percentile is a 1 % event
    assert binom.cdf(1, needed, 1 - percent / 100) <= 0.01 < binom.cdf(1, needed - 1, 1 - percent / 100)


def test_unknown_percentile_and_no_samples_are_the_users_mistake():
    with pytest.raises(HarnessInputError, match=r"90, 95, 99, 99\.9"):
        statistics.percentile([1.0] * 100, 50)
    with pytest.raises(HarnessInputError, match="no samples"):
        statistics.median([])
    with pytest.raises(HarnessInputError, match="at least 2 rounds"):
        statistics.median_estimate([[1.0, 2.0]], seed=0)


def test_hierarchical_bootstrap_equals_writing_the_resamples_out():
    rng = np.random.default_rng(3)
    rounds = [rng.lognormal(0.02 * rng.normal(), 0.1, size=size) for size in (410, 600, 550, 380, 470)]
    walked = statistics.hierarchical_percentiles(rounds, 50, seed=1, resamples=2000)
    written_out = [
        np.percentile(
            np.concatenate([rng.choice(rounds[r], rounds[r].size) for r in rng.integers(5, size=5)]),
            50,
            method="inverted_cdf",
        )
        for _ in range(2000)
    ]
    # Monte Carlo error of a standard deviation from 2000 draws is about 1.6 %
    assert np.std(walked) == pytest.approx(np.std(written_out), rel=0.08)
    for quantile in (2.5, 50, 97.5):
        expected = np.percentile(written_out, quantile)
        assert np.percentile(walked, quantile) == pytest.approx(expected, abs=0.2 * np.std(written_out))


def test_the_spread_between_rounds_widens_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, size=(10, 200))
    calm = statistics.median_estimate(1 + noise, seed=0)
    drifting = statistics.median_estimate(1 + noise + np.linspace(0, 0.2, 10)[:, None], seed=0)
    assert drifting.high - drifting.low > 10 * (calm.high - calm.low)


def test_rate_and_mean_by_hand():
    rate = statistics.rate_estimate([10, 20, 30], [1.0, 2.0, 3.0], seed=0)
    assert (rate.value, rate.low, rate.high) == (10.0, 10.0, 10.0)
    mean = statistics.mean_estimate([[1.0, 3.0], [5.0]], seed=0)
    assert mean.value == 3.0
    assert (mean.low, mean.high, mean.samples) == (2.0, 5.0, 3)


def test_paired_speedup_by_hand():
    # round medians 2, 4, 6 against 1, 2, 2: ratios 2, 2, 3; their median is 2
    ratio = ratios.paired_speedup([[2, 2], [3, 5], [6]], [[1], [2, 2], [1, 3]], baseline="dense", seed=0)
    assert ratio.value == pytest.approx(2.0)
    # Three rounds: Student's interval of the logarithms, 0.8283 +- 4.303 x 0.2341 / sqrt(3)
    assert (ratio.low, ratio.high) == (pytest.approx(1.280, abs=1e-3), pytest.approx(4.095, abs=2e-3))
    assert (ratio.verdict, ratio.samples, ratio.baseline) == ("unclear", 3, "dense")


def test_paired_speedup_of_enough_rounds_ends_at_ratios_that_were_seen():
    ratio = ratios.paired_speedup([[2.0]] * 5 + [[6.0]] * 2, [[1.0]] * 5 + [[2.0]] * 2, baseline="dense", seed=0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 3.0))


def test_the_baseline_run_twice_counts_as_its_geometric_mean():
    # 1 and 4 in every round: held against their geometric mean, 2
    ratio = ratios.paired_speedup([[1.0]] * 6, [[1.0]] * 6, again_rounds=[[4.0]] * 6, baseline="dense", seed=0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_processes_that_differ_widen_the_interval():
    """Ten rounds in each of three processes, which differ by 1 %: as rounds of one process they would seem precise."""
    rng = np.random.default_rng(0)
    variant = [[np.exp(shift + 0.002 * rng.normal())] for shift in (-0.01, 0.0, 0.01) for _ in range(10)]
    processes = [process for process in range(3) for _ in range(10)]
    one = ratios.paired_speedup([[1.0]] * 30, variant, baseline="a", seed=0)
    three = ratios.paired_speedup([[1.0]] * 30, variant, baseline="a", seed=0, processes=processes)
    assert ratios.half_width(three) > 1.5 * ratios.half_width(one)
    assert ratios.half_width(three) >= 0.009
    with pytest.raises(HarnessInputError, match="30 rounds, but processes are named for 3"):
        ratios.paired_speedup([[1.0]] * 30, variant, baseline="a", seed=0, processes=[0, 1, 2])


def test_rounds_are_drawn_by_process():
    drawn = statistics.draw_rounds(np.array([0, 0, 1]), np.random.default_rng(0), 4000)
    assert drawn.shape == (4000, 3)
    # The first two stand for one process: both come from the same, the first or the second
    together = {tuple(sorted({0: 0, 1: 0, 2: 1}[i] for i in row[:2])) for row in drawn.tolist()}
    assert together == {(0, 0), (1, 1)}
    assert np.bincount(drawn[:, 2], minlength=3) / 4000 == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


def test_few_rounds_widen_percentile_intervals_towards_students():
    # n = 10: the tail at which a normal interval is as wide as 2.262 x sqrt(10 / 9) standard errors
    assert statistics.tail_percent(10) == pytest.approx(0.856, abs=0.005)
    assert statistics.tail_percent(1000) == pytest.approx(2.5, abs=0.03)


@pytest.mark.parametrize(
    ("interval", "spread", "verdict"),
    [
        ((1.02, 1.03, 1.04), 1.0, "faster"),
        ((1.02, 1.03, 1.04), 1.035, "unclear"),
        ((0.96, 0.97, 0.98), 1.0, "slower"),
        ((0.96, 0.97, 0.98), 1.04, "unclear"),
        ((0.99, 1.0, 1.01), 1.0, "equivalent"),
        ((1.002, 1.004, 1.009), 1.0, "equivalent"),
        ((0.97, 1.0, 1.03), 1.0, "unclear"),
    ],
)
def test_verdict(interval, spread, verdict):
    low, value, high = interval
    ratio = statistics.Estimate(value=value, low=low, high=high, samples=10)
    assert ratios.verdict(ratio, spread=spread) == verdict


def test_spread_of_a_ratio_to_itself_is_its_farther_end():
    def same(low, high):
        return ratios.spread_of(statistics.Estimate(value=1.0, low=low, high=high, samples=10))

    assert same(0.98, 1.01) == pytest.approx(1 / 0.98)
    assert same(0.99, 1.03) == 1.03


def test_pairing_removes_a_drift_that_both_share():
    drift = np.linspace(1, 2, 10)[:, None]
    rng = np.random.default_rng(0)
    before, after = drift * rng.normal(1.05, 0.005, (10, 99)), drift * rng.normal(1, 0.005, (10, 99))
    ratio = ratios.paired_speedup(before, after, baseline="a", seed=0)
    assert ratio.verdict == "faster"
    assert ratio.high - ratio.low < 0.01


def test_different_rounds_cannot_be_paired():
    with pytest.raises(HarnessInputError, match="same rounds"):
        ratios.paired_speedup([[1.0]] * 3, [[1.0]] * 2, baseline="a", seed=0)


@settings(max_examples=40, deadline=None)
@given(latencies, st.integers(0, 5))
def test_intervals_contain_the_estimate_and_repeat_by_seed(rounds, seed):
    for estimate in (statistics.median_estimate, statistics.mean_estimate):
        first = estimate(rounds, seed=seed, resamples=200)
        assert first.low <= first.value <= first.high
        assert first == estimate(rounds, seed=seed, resamples=200)
        assert first.samples == sum(map(len, rounds))


@settings(max_examples=40, deadline=None)
@given(latencies, st.floats(0.01, 100), st.integers(0, 5))
def test_ratio_ignores_a_common_scale_and_inverts_when_exchanged(rounds, scale, seed):
    other = [[value * (1 + 0.1 * i) for value in samples] for i, samples in enumerate(rounds)]
    plain = ratios.paired_speedup(rounds, other, baseline="a", seed=seed, resamples=200)
    scaled = ratios.paired_speedup(
        [np.multiply(samples, scale) for samples in rounds],
        [np.multiply(samples, scale) for samples in other],
        baseline="a",
        seed=seed,
        resamples=200,
    )
    swapped = ratios.paired_speedup(other, rounds, baseline="b", seed=seed, resamples=200)
    for one, two in ((plain.value, scaled.value), (plain.low, scaled.low), (plain.high, scaled.high)):
        assert one == pytest.approx(two, rel=1e-9)
    assert plain.value == pytest.approx(1 / swapped.value, rel=1e-9)
    assert plain.low <= plain.value <= plain.high


def test_accuracy_interval_is_wilsons():
    # Wilson's interval of 8 in 10 at 95 %: 0.4902 to 0.9433 (Wilson 1927)
    estimate = statistics.proportion_estimate_percent(80.0, 10)
    assert (estimate.low, estimate.high) == (pytest.approx(49.02, abs=0.01), pytest.approx(94.33, abs=0.01))
    assert statistics.proportion_estimate_percent(100.0, 360).high == 100.0


def test_an_estimate_outside_its_interval_cannot_be_made():
    with pytest.raises(ValueError, match="does not contain"):
        statistics.Estimate(value=3.0, low=1.0, high=2.0, samples=5)
