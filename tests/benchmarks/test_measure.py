"""The measuring loop on a fake clock, where every latency is known."""

import gc
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.measure import AGAIN, Variant, measure
from benchmarks.harness.ratios import half_width
from benchmarks.harness.rounds import Plan

QUICK = Plan(seconds=0.0, queries=20, warmup_s=0.0, time_budget_s=1.0)


def test_every_sample_is_kept_and_right(machine):
    measurement = measure(
        [machine.variant("a", 1_000_000, noise=0), machine.variant("b", 2_000_000, noise=0)],
        baseline="a",
        plan=replace(QUICK, rounds=6),
        clock=machine.clock,
    )
    for name, expected_ns in (("a", 1_000_000), ("b", 2_000_000)):
        rounds = measurement.variants[name].rounds_ns
        assert [samples.tolist() for samples in rounds] == [[expected_ns] * 20] * 6
    slow = measurement.variants["b"]
    assert (slow.median_ms.value, slow.mean_ms.value, slow.median_ms.samples) == (2.0, 2.0, 120)
    assert slow.p95_ms is None  # 120 samples do not carry it
    assert slow.p90_ms.value == 2
    assert slow.throughput_per_s.value == pytest.approx(500)
    assert slow.speedup.value == pytest.approx(0.5)
    assert slow.speedup.verdict == "slower"
    assert measurement.variants["a"].speedup is None
    assert measurement.again.value == 1
    assert measurement.again.verdict == "equivalent"
    assert measurement.stopped_by == "precision"


def test_nothing_is_claimed_of_a_few_rounds(machine):
    variants = [machine.variant("a", 1_000_000, noise=0), machine.variant("b", 2_000_000, noise=0)]
    measurement = measure(variants, baseline="a", plan=replace(QUICK, rounds=5), clock=machine.clock)
    assert measurement.variants["b"].speedup.value == pytest.approx(0.5)
    assert measurement.variants["b"].speedup.verdict == "unclear"


def test_throughput_counts_samples_not_queries(machine):
    measurement = measure(
        [machine.variant("a", 4_000_000, noise=0, batch_size=16)],
        baseline="a",
        plan=replace(QUICK, rounds=2),
        clock=machine.clock,
    )
    measured = measurement.variants["a"]
    assert measured.throughput_per_s.value == pytest.approx(4000)
    assert measured.throughput_per_s.samples == 16 * 40
    assert measured.scenario == "Offline"


def test_rounds_are_complete_with_the_baseline_twice_and_their_order_is_drawn_by_seed(machine):
    def order(seed):
        variants = [machine.variant(name, 1_000_000, noise=0) for name in "abc"]
        return measure(variants, baseline="a", plan=replace(QUICK, rounds=8), seed=seed, clock=machine.clock).order

    orders = order(0)
    assert all(sorted(names) == ["a", AGAIN.format("a"), "b", "c"] for names in orders)
    assert len(set(orders)) > 1
    assert orders == order(0) != order(1)


def test_rewarmed_before_every_round(machine):
    calls = itertools.count()

    def step():
        next(calls)
        machine.now_ns += 10_000_000

    measure(
        [Variant("a", step)],
        baseline="a",
        plan=Plan(rounds=4, seconds=0, queries=5, warmup_s=0.03),
        clock=machine.clock,
    )
    # The baseline and again: the first query, a warm-up to plan the rounds, four rounds, and one query for its stages
    assert next(calls) == 2 * (1 + 3 + 4 * (3 + 5) + 1)


def test_both_minima_are_reached(machine):
    measurement = measure(
        [machine.variant("quick", 1_000_000, noise=0), machine.variant("slow", 100_000_000, noise=0)],
        baseline="slow",
        plan=Plan(rounds=2, seconds=0.5, queries=10, warmup_s=0, time_budget_s=600),
        clock=machine.clock,
    )
    assert [samples.size for samples in measurement.variants["quick"].rounds_ns] == [500, 500]
    assert [samples.size for samples in measurement.variants["slow"].rounds_ns] == [10, 10]


def test_time_budget_shortens_the_rounds(machine):
    measurement = measure(
        [machine.variant("a", 10_000_000, noise=0), machine.variant("b", 10_000_000, noise=0)],
        baseline="a",
        plan=Plan(rounds=10, time_budget_s=5, warmup_s=0.02),
        clock=machine.clock,
    )
    assert len(measurement.order) == 10
    assert measurement.elapsed_s <= 5.1
    assert measurement.variants["a"].rounds_ns[0].size < 50


def test_time_budget_too_short_for_the_rounds_still_gives_two_and_says_so(machine):
    measurement = measure(
        [machine.variant("a", 3_000_000_000, noise=0)],
        baseline="a",
        plan=Plan(time_budget_s=1),
        clock=machine.clock,
    )
    assert measurement.stopped_by == "time"
    assert len(measurement.order) == 2
    assert [samples.size for samples in measurement.variants["a"].rounds_ns] == [1, 1]


def test_rounds_go_on_until_the_ratios_are_precise_or_the_time_is_over(machine):
    def measured(half_width):
        variants = [machine.variant("a", 1_000_000), machine.variant("b", 1_100_000)]
        plan = Plan(rounds=4, seconds=0.02, queries=5, warmup_s=0, time_budget_s=8, half_width=half_width)
        return measure(variants, baseline="a", plan=plan, clock=machine.clock)

    coarse, fine, never = measured(0.05), measured(0.004), measured(0.0)
    assert coarse.stopped_by == fine.stopped_by == "precision"
    assert len(coarse.order) < len(fine.order) < len(never.order)
    for measurement, wanted in ((coarse, 0.05), (fine, 0.004)):
        speedup = measurement.variants["b"].speedup
        assert half_width(speedup) <= 1.1 * wanted  # the look on the way takes fewer resamples
    assert never.stopped_by == "time"
    assert never.elapsed_s == pytest.approx(8, abs=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_equal_variants_get_no_claim_and_a_slower_one_is_called_slower(machine, seed):
    machine.rng = np.random.default_rng(seed)
    measurement = measure(
        [
            machine.variant("a", 1_000_000),
            machine.variant("same", 1_000_000),
            machine.variant("3 % slower", 1_030_000),
        ],
        baseline="a",
        plan=replace(QUICK, queries=100, time_budget_s=6),
        seed=seed,
        clock=machine.clock,
    )
    same = measurement.variants["same"].speedup
    assert same.verdict in ("equivalent", "unclear")
    assert same.low <= 1 <= same.high
    assert measurement.variants["3 % slower"].speedup.verdict == "slower"


def test_no_claim_below_the_spread_of_the_baseline_against_itself(machine):
    """The baseline is 5 % slower in every second call of its turn: it differs from itself by as much as B does."""
    turns = itertools.count()

    def unsteady():
        machine.now_ns += 1_000_000 if next(turns) // 40 % 2 else 1_060_000

    measurement = measure(
        [Variant("a", unsteady), machine.variant("b", 985_000, noise=0)],
        baseline="a",
        plan=replace(QUICK, rounds=6, queries=40, time_budget_s=0.9),
        clock=machine.clock,
    )
    assert max(measurement.again.high, 1 / measurement.again.low) > measurement.variants["b"].speedup.value
    assert measurement.variants["b"].speedup.verdict == "unclear"


def test_progress_and_close(machine):
    seen, closed = [], []
    variants = [Variant("a", machine.variant("a", 1000, noise=0).step, close=lambda: closed.append("a"))]
    measure(
        variants,
        baseline="a",
        plan=replace(QUICK, rounds=3),
        on_round=lambda done, elapsed_s: seen.append(done),
        clock=machine.clock,
    )
    assert seen == [1, 2, 3]
    assert closed == ["a"]


def test_a_variant_that_dies_leaves_the_others_figures_standing(machine):
    calls, closed = itertools.count(), []
    healthy = machine.variant("healthy", 1000).step

    def dies():
        machine.now_ns += 1000
        if next(calls) == 70:
            raise OSError("device lost")

    variants = [
        Variant("healthy", healthy, close=lambda: closed.append("healthy")),
        Variant("dying", dies, close=lambda: closed.append("dying")),
        machine.variant("other", 2000, noise=0),
    ]
    measurement = measure(variants, baseline="healthy", plan=QUICK, clock=machine.clock)
    assert measurement.failures == {"dying": "Variant 'dying' failed while it was measured: device lost"}
    assert set(measurement.variants) == {"healthy", "other"}
    assert len(measurement.variants["other"].rounds_ns) == len(measurement.order) >= 10
    assert measurement.variants["other"].speedup.value == pytest.approx(0.5, rel=0.05)
    assert any("dying" in names for names in measurement.order)
    assert "dying" not in measurement.order[-1]
    assert closed == ["healthy", "dying"]
    assert gc.isenabled()


def test_without_its_baseline_a_variant_has_latencies_and_no_speedup(machine):
    def dies():
        machine.now_ns += 1000
        if machine.now_ns > 200_000:
            raise OSError("device lost")

    measurement = measure(
        [Variant("base", dies), machine.variant("other", 2000, noise=0)],
        baseline="base",
        plan=QUICK,
        clock=machine.clock,
    )
    assert set(measurement.failures) == {"base", AGAIN.format("base")}
    assert measurement.again is None
    assert measurement.variants["other"].median_ms.value == 0.002
    assert measurement.variants["other"].speedup is None


def test_when_all_die_the_measurement_fails_with_the_reason(machine):
    def dies():
        raise OSError("device lost")

    with pytest.raises(HarnessError, match="'a' failed while it was measured: device lost"):
        measure([Variant("a", dies)], baseline="a", plan=QUICK, clock=machine.clock)


def test_rounds_in_which_the_machine_throttled_are_run_again_and_counted(machine):
    class Throttling:
        """The second part of the first two rounds meets a hot machine."""

        def __init__(self):
            self.parts = 0

        def start(self):
            self.parts += 1

        def stop(self, *, own_cpu_s):
            return SimpleNamespace(throttled=self.parts in (2, 4))

    measurement = measure(
        [machine.variant("a", 1000, noise=0)],
        baseline="a",
        plan=replace(QUICK, rounds=3),
        watch=Throttling(),
        clock=machine.clock,
    )
    measured = measurement.variants["a"]
    assert measurement.reruns == 2
    assert len(measured.rounds_ns) == len(measurement.order) == 3
    assert [samples.tolist() for samples in measured.throttled_ns] == [[1000] * 20] * 2  # no sample is dropped
    assert len(measured.conditions) == 5


def test_garbage_collection_is_off_while_the_clock_runs(machine):
    states = []

    def step():
        states.append(gc.isenabled())
        machine.now_ns += 1000

    measure([Variant("a", step)], baseline="a", plan=replace(QUICK, rounds=2), clock=machine.clock)
    assert states.count(False) == 2 * 2 * 20
    assert gc.isenabled()


def test_a_step_that_takes_no_time_is_refused(machine):
    with pytest.raises(HarnessError, match="no measurable time"):
        measure([Variant("empty", lambda: None)], baseline="empty", plan=QUICK, clock=machine.clock)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ([], {}, "nothing to measure"),
        (["a", "a"], {}, "same name"),
        (["a"], {"baseline": "z"}, "'z' is not among the variants a"),
        (["a"], {"plan": Plan(rounds=1)}, "at least 2"),
        (["a"], {"plan": Plan(time_budget_s=0)}, "positive number of seconds"),
        (["a"], {"plan": Plan(queries=0)}, "at least 1"),
        (["a"], {"plan": Plan(processes=0)}, "at least 1"),
    ],
)
def test_bad_input(machine, names, change, message):
    variants = [machine.variant(name, 1000) for name in names]
    with pytest.raises(HarnessInputError, match=message):
        measure(variants, **({"baseline": "a", "clock": machine.clock} | change))


def test_different_batch_sizes_do_not_compare(machine):
    variants = [machine.variant("a", 1000), machine.variant("b", 1000, batch_size=8)]
    with pytest.raises(HarnessInputError, match=r"one positive batch size only, but got \[1, 8\]"):
        measure(variants, baseline="a", clock=machine.clock)


def test_the_real_clock_adds_little_to_a_query():
    measurement = measure(
        [Variant("nothing", lambda: None)],
        baseline="nothing",
        plan=Plan(rounds=3, seconds=0.01, warmup_s=0.01, time_budget_s=0.2),
    )
    assert measurement.variants["nothing"].median_ms.value < 0.02  # 20 µs, the harness's promise
