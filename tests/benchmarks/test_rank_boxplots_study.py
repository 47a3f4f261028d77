"""Ranks against ranks worked out by hand."""

import numpy as np
import pytest
import torch

from benchmarks.studies import rank_boxplots
from benchmarks.studies.networks import Setting
from benchmarks.studies.rank_boxplots import lowest_in, median_rank, median_spread, normalised_ranks, removed_share
from benchmarks.studies.study import Options


def scores(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def test_ranks_run_over_all_groups_together():
    ranks = normalised_ranks(scores(a=[3.0, 0.5], b=[9.0, 1.0, 2.0]))
    assert ranks == {"a": [0.75, 0.0], "b": [1.0, 0.25, 0.5]}


def test_equal_scores_share_their_mean_rank():
    ranks = normalised_ranks(scores(a=[0.0, 0.0], b=[0.0, 5.0, 7.0]))
    assert ranks == {"a": [0.25, 0.25], "b": [0.25, 0.75, 1.0]}


def test_spread_of_medians_by_hand():
    assert median_spread({"a": [0.0, 0.2, 1.0], "b": [0.6]}) == pytest.approx(0.2)  # medians 0.2 and 0.6
    assert median_spread({"a": [0.5], "b": [0.1, 0.5, 0.9]}) == 0


def test_share_of_the_lowest_quarter_by_hand():
    ranks = {"stage1.0": [0.9, 0.1], "stage2.0": [0.2, 0.0, 0.25, 0.5, 0.6, 1.0]}  # 0.25 is not below a quarter
    low, every = lowest_in(ranks, ("stage1",))
    assert low == pytest.approx(1 / 3)
    assert every == pytest.approx(2 / 8)


def test_removed_share_by_hand():
    run = {"before": {"conv1": [0.1] * 4, "fc1": [0.2] * 6}, "after": {"conv1": [0.5] * 3, "fc1": [0.1] * 2}}
    assert removed_share(run, ("conv1",)) == pytest.approx(0.25)
    assert removed_share(run, ("",)) == pytest.approx(0.5)


def test_residual_streams_against_the_rest():
    ranks = {"conv1": [0.8, 1.0], "stage1.0.conv1": [0.1, 0.2, 0.6]}
    assert median_rank(ranks, streams=True) == pytest.approx(0.9)
    assert median_rank(ranks, streams=False) == pytest.approx(0.2)


def test_survivors_keep_the_ranks_they_had(tmp_path, monkeypatch):
    tiny = Setting(image_size=16, epochs=1, quick_epochs=1, learning_rate=0.02)
    monkeypatch.setitem(rank_boxplots.SETTINGS, ("lenet3", "digits"), tiny)
    found = rank_boxplots.ranked("lenet3", 0, Options(tmp_path, quick=True))
    assert found["macs_kept"] <= 0.5
    for group, after in found["after"].items():
        assert len(after) == len(found["survivors"][group]) == len(found["tuned"][group])
        assert set(found["survivors"][group]) <= set(found["before"][group])
    everything = np.concatenate(list(found["after"].values()))
    assert everything.mean() == pytest.approx(0.5)
    rows = rank_boxplots.boxplots([found], "LeNet3")
    assert len(rows.axes) == 4
