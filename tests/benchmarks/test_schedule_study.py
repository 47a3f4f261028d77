"""The schedules of the study: all end at the same number of channels, and frozen scores are one-shot pruning."""

import pytest
import torch
from torch import nn

from benchmarks.studies import schedule
from benchmarks.studies.schedule import Runs, findings
from benchmarks.studies.schedule_runs import FROZEN, ITERATIVE, ONE_SHOT, REGIMES, Frozen, Schedule, prune
from benchmarks.studies.study import Cells, Options
from compress import data
from compress.graph import trace
from compress.models import lenet3


@pytest.fixture(scope="module")
def loaded():
    return data.load("digits", batch_size=64, image_size=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lenet3(num_classes=10, in_channels=1, image_size=16).eval()


def count(run):
    return sum(len(channels) for channels in run["kept"].values())


@pytest.mark.parametrize("regime", list(REGIMES))
def test_all_schedules_end_at_the_same_number_of_channels(model, loaded, regime):
    runs = [prune(model, loaded, regime, s, 0.3, seed=0) for s in (ONE_SHOT, ITERATIVE, FROZEN, Schedule(64, 0.0))]
    assert [count(run) for run in runs] == [75] * 4  # 0.3 x 252 = 75.6
    assert [len(run["curve"]) for run in runs] == [1, 16, 16, 1]
    assert all(run["curve"][-1]["channels"] == 75 for run in runs)


def test_frozen_scores_leave_the_one_shot_channels_while_the_weights_stay(model, loaded):
    once, frozen, iterative = (prune(model, loaded, "fixed", s, 0.3, seed=0) for s in (ONE_SHOT, FROZEN, ITERATIVE))
    assert frozen["kept"] == once["kept"]
    assert frozen["curve"][-1] == once["curve"][-1]
    assert iterative["kept"] != once["kept"]


def test_the_dense_network_stays_as_it_is(model, loaded):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, loaded, "trained", ITERATIVE, 0.5, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_scores_follow_the_channels_left():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = trace(model, torch.zeros(1, 3))
    frozen = Frozen(model, graph, {"0": torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)})
    graph.remove({"0": torch.tensor([1, 3])})
    frozen.removed({"0": torch.tensor([1, 3])}, {"0": 4})
    frozen.observe()
    assert frozen.scores()["0"].tolist() == [4.0, 2.0]


def fake_runs(tmp_path, monkeypatch, losses):
    """The study on invented outcomes: `losses` maps a schedule to its loss by seed."""

    def outcome(model, loaded, regime, one, kept, seed):
        point = {"channels": 10, "top1": 90.0, "loss": losses(one, seed)}
        return {"curve": [point] * (16 if one in (ITERATIVE, FROZEN) else 1), "tuned": point, "kept": {"a": [seed]}}

    monkeypatch.setattr(schedule, "trained", lambda *args: (None, None))
    monkeypatch.setattr(schedule, "dense_state", lambda *args: {"channels": 20, "top1": 99.0, "loss": 0.01})
    monkeypatch.setattr(schedule, "prune", outcome)
    (tmp_path / "cells").mkdir()
    options = Options(tmp_path, quick=False)
    return Runs(Cells(options, "schedule", {}), options)


def test_a_finding_agrees_only_where_every_seed_does(tmp_path, monkeypatch):
    def losses(one, seed):
        if one == ITERATIVE:
            return 0.5
        return 1.0 if one != FROZEN or seed else 0.4  # frozen scores win with seed 0

    runs = fake_runs(tmp_path, monkeypatch, losses)
    rows = findings(runs)
    assert [row.agrees for row in rows[:3]] == [True, True, False]
    assert "the lower loss with 2 of 3 seeds" in rows[2].measured
    assert runs.frozen_is_one_shot() == "6 of 6"
    assert all(row.agrees is None for row in rows[3:])
    assert "(lowest at 16)" in runs.by_events(0.9)
    schedule.curves(runs)
    schedule.events_figure(runs)
