"""The measuring loop on a fake clock, where every latency is known."""

import gc
import itertools

import numpy as np
import pytest

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.measure import Variant, measure

QUICK = {"min_seconds_per_round": 0.0, "min_queries_per_round": 20, "warmup_seconds": 0.0}


def test_every_sample_is_kept_and_right(machine):
    measurement = measure(
        [machine.variant("a", 1_000_000, noise=0), machine.variant("b", 2_000_000, noise=0)],
        baseline="a",
        rounds=3,
        clock=machine.clock,
        **QUICK,
    )
    for name, expected_ns in (("a", 1_000_000), ("b", 2_000_000)):
        rounds = measurement.variants[name].rounds_ns
        assert [samples.tolist() for samples in rounds] == [[expected_ns] * 20] * 3
    slow = measurement.variants["b"]
    assert (slow.median_ms.value, slow.mean_ms.value, slow.median_ms.samples) == (2.0, 2.0, 60)
    assert slow.p90_ms is None  # 60 samples do not carry it
    assert slow.throughput_per_s.value == pytest.approx(500)
    assert slow.speedup.value == pytest.approx(0.5)
    assert slow.speedup.verdict == "slower"
    assert measurement.variants["a"].speedup is None
    assert measurement.stopped_by == "rounds"


def test_throughput_counts_images_not_queries(machine):
    measurement = measure(
        [machine.variant("a", 4_000_000, noise=0, batch_size=8)],
        baseline="a",
        rounds=2,
        clock=machine.clock,
        **QUICK,
    )
    measured = measurement.variants["a"]
    assert measured.throughput_per_s.value == pytest.approx(2000)
    assert measured.throughput_per_s.samples == 8 * 40
    assert measured.scenario == "Offline"


def test_rounds_are_complete_and_their_order_is_drawn_by_seed(machine):
    def order(seed):
        variants = [machine.variant(name, 1_000_000) for name in "abc"]
        return measure(variants, baseline="a", rounds=8, seed=seed, clock=machine.clock, **QUICK).order

    orders = order(0)
    assert all(sorted(names) == ["a", "b", "c"] for names in orders)
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
        rounds=4,
        min_seconds_per_round=0,
        min_queries_per_round=5,
        warmup_seconds=0.03,
        clock=machine.clock,
    )
    assert next(calls) == 3 + 4 * (3 + 5)


def test_both_minima_are_reached(machine):
    measurement = measure(
        [machine.variant("quick", 1_000_000, noise=0), machine.variant("slow", 100_000_000, noise=0)],
        baseline="slow",
        rounds=2,
        min_seconds_per_round=0.5,
        min_queries_per_round=10,
        warmup_seconds=0,
        clock=machine.clock,
    )
    assert [samples.size for samples in measurement.variants["quick"].rounds_ns] == [500, 500]
    assert [samples.size for samples in measurement.variants["slow"].rounds_ns] == [10, 10]


def test_time_budget_shortens_the_rounds_and_says_so(machine):
    measurement = measure(
        [machine.variant("a", 10_000_000, noise=0), machine.variant("b", 10_000_000, noise=0)],
        baseline="a",
        rounds=10,
        time_budget_s=5,
        warmup_seconds=0.02,
        clock=machine.clock,
    )
    assert measurement.stopped_by == "time"
    assert len(measurement.order) == 10
    assert measurement.elapsed_s <= 5.1
    assert measurement.variants["a"].rounds_ns[0].size < 50


def test_time_budget_too_short_for_the_rounds_still_gives_two(machine):
    measurement = measure(
        [machine.variant("a", 3_000_000_000, noise=0)], baseline="a", time_budget_s=1, clock=machine.clock
    )
    assert measurement.stopped_by == "time"
    assert len(measurement.order) == 2
    assert [samples.size for samples in measurement.variants["a"].rounds_ns] == [1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_equal_variants_get_no_claim_and_a_slower_one_is_called_slower(machine, seed):
    machine.rng = np.random.default_rng(seed)
    measurement = measure(
        [
            machine.variant("a", 1_000_000),
            machine.variant("again", 1_000_000),
            machine.variant("3 % slower", 1_030_000),
        ],
        baseline="a",
        seed=seed,
        clock=machine.clock,
        **(QUICK | {"min_queries_per_round": 100}),
    )
    again = measurement.variants["again"].speedup
    assert again.verdict == "unclear"
    assert again.low <= 1 <= again.high
    assert measurement.variants["3 % slower"].speedup.verdict == "slower"


def test_progress_and_close(machine):
    seen, closed = [], []
    variants = [Variant("a", machine.variant("a", 1000).step, close=lambda: closed.append("a"))]
    measure(
        variants,
        baseline="a",
        rounds=3,
        on_round=lambda done, planned: seen.append((done, planned)),
        clock=machine.clock,
        **QUICK,
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert closed == ["a"]


def test_a_variant_that_dies_is_named_and_everything_is_closed(machine):
    calls, closed = itertools.count(), []
    healthy = machine.variant("healthy", 1000).step

    def dies():
        machine.now_ns += 1000
        if next(calls) == 30:
            raise OSError("device lost")

    variants = [
        Variant("healthy", healthy, close=lambda: closed.append("healthy")),
        Variant("dying", dies, close=lambda: closed.append("dying")),
    ]
    with pytest.raises(HarnessError, match="'dying' failed while it was measured: device lost"):
        measure(variants, baseline="healthy", clock=machine.clock, **QUICK)
    assert closed == ["healthy", "dying"]
    assert gc.isenabled()


def test_garbage_collection_is_off_while_the_clock_runs(machine):
    states = []

    def step():
        states.append(gc.isenabled())
        machine.now_ns += 1000

    measure([Variant("a", step)], baseline="a", rounds=2, clock=machine.clock, **QUICK)
    assert states.count(False) == 2 * 20
    assert gc.isenabled()


def test_a_step_that_takes_no_time_is_refused(machine):
    with pytest.raises(HarnessError, match="no measurable time"):
        measure([Variant("empty", lambda: None)], baseline="empty", clock=machine.clock, **QUICK)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ([], {}, "nothing to measure"),
        (["a", "a"], {}, "same name"),
        (["a"], {"baseline": "z"}, "'z' is not among the variants a"),
        (["a"], {"rounds": 1}, "at least 2"),
        (["a"], {"time_budget_s": 0}, "positive number of seconds"),
        (["a"], {"min_queries_per_round": 0}, "at least 1"),
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
        rounds=3,
        min_seconds_per_round=0.01,
        warmup_seconds=0.01,
    )
    assert measurement.variants["nothing"].median_ms.value < 0.02  # 20 µs, the harness's promise
