"""The queue M/D/1 against what is known of it, and a short run of the comparison."""

import itertools
import json
from dataclasses import fields

import numpy as np
import pytest
from scipy import integrate

from benchmarks import server_truth
from benchmarks.harness.server import arrivals
from benchmarks.server_truth import Row, closed_client, latency_quantile, lindley, verdict, waiting_probability

MS = 1_000_000


@pytest.mark.parametrize("utilisation", [0.1, 0.5, 0.7, 0.8, 0.95])
def test_an_arrival_finds_the_queue_empty_in_the_share_that_is_idle(utilisation):
    assert float(waiting_probability(0.0, utilisation)) == pytest.approx(1 - utilisation)


@pytest.mark.parametrize("utilisation", [0.3, 0.5, 0.8])
def test_mean_wait_is_that_of_pollaczek_and_khinchin(utilisation):
    # E W = ∫ P(W > w) dw = ρ / (2 (1 - ρ)) services; the density jumps at whole services.
    mean = sum(
        integrate.fixed_quad(
            lambda waits: [1 - float(waiting_probability(wait, utilisation)) for wait in waits], start, start + 1, n=8
        )[0]
        for start in range(60)
    )
    assert mean == pytest.approx(utilisation / (2 * (1 - utilisation)), rel=1e-5)


def test_waits_below_one_service_by_hand():
    # P(W <= w) = (1 - ρ) e^{ρ w} for w < 1, and (1 - ρ) (e^{ρ w} - ρ (w - 1) e^{ρ (w - 1)}) for 1 <= w < 2.
    assert float(waiting_probability(0.5, 0.6)) == pytest.approx(0.4 * np.exp(0.3))
    assert float(waiting_probability(1.5, 0.6)) == pytest.approx(0.4 * (np.exp(0.9) - 0.3 * np.exp(0.3)))
    assert waiting_probability(-0.1, 0.6) == 0


@pytest.mark.parametrize("utilisation", [0.5, 0.9])
def test_probability_rises_to_one_without_loss_of_digits(utilisation):
    found = [waiting_probability(wait, utilisation) for wait in np.linspace(0, 100, 201)]
    assert all(before <= after <= 1 for before, after in itertools.pairwise(found))
    assert float(found[-1]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("utilisation", "services"), [(0.5, 4.34), (0.7, 7.5), (0.8, 11.4)])
def test_quantile_agrees_with_a_long_simulation(utilisation, services):
    exact = latency_quantile(0.99, utilisation)
    assert exact == pytest.approx(services, rel=0.02)
    simulated = server_truth.p99(lindley(arrivals(1e3 * utilisation, 2_000_000, seed=0), np.full(2_000_000, MS))) / MS
    assert simulated == pytest.approx(exact, rel=0.03)
    assert latency_quantile(0.3, 0.5) == 1.0  # half of the queries do not wait


def test_lindley_by_hand():
    due_ns = np.array([0, 10, 20, 100]) * MS
    assert (lindley(due_ns, np.full(4, 15 * MS)) / MS).tolist() == [15, 20, 25, 15]
    assert (lindley(due_ns, np.array([5, 25, 1, 3]) * MS) / MS).tolist() == [5, 25, 16, 3]


def test_the_closed_client_leaves_out_the_wait():
    class Clocked:
        size = 1
        now = 0

        def clock(self):
            return self.now

        def sleep(self, seconds):
            self.now += round(seconds * 1e9)

        def query(self, index):
            self.now += 15 * MS

    lane = Clocked()
    latencies = closed_client(lane, np.array([0, 10, 20]) * MS, clock=lane.clock, sleep=lane.sleep)
    assert latencies.tolist() == [15 * MS] * 3  # the queue's own: 15, 20, 25
    assert lane.now == 45 * MS


def row(utilisation, deviation, decides):
    numbers = dict.fromkeys((field.name for field in fields(Row)), 0.0)
    return Row(**numbers | {"utilisation": utilisation, "deviation": deviation, "decides": decides})


def test_only_an_undisturbed_attempt_decides():
    rows = [row(0.5, 0.4, False), row(0.5, -0.04, True), row(0.7, 0.02, False), row(0.8, 0.12, True)]
    assert verdict(rows, 0.5) == "holds"
    assert verdict(rows, 0.7).startswith("undecided")
    assert verdict(rows, 0.8) == "MISSED"


def test_short_run(tmp_path, capsys):
    out = tmp_path / "truth.json"
    code = server_truth.main(["--share", "0.001", "--attempts", "1", "--service-ms", "0.2", "--out", str(out)])
    written = json.loads(out.read_text())
    assert code == (0 if set(written["verdicts"].values()) == {"holds"} else 1)  # so few queries decide nothing
    assert [row["utilisation"] for row in written["rows"]] == [0.5, 0.7, 0.8]
    for row in written["rows"]:
        assert row["queries"] == 662
        assert row["wrong_by"] > 1
    assert written["null_overhead"]["overhead_us"] < 50
    assert "99th percentile of latency" in capsys.readouterr().out
