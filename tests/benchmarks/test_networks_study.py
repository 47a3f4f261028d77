"""The networks that the studies share: trained once, the same for a seed, read from the checkpoint afterwards."""

import numpy as np
import pytest
import torch

from benchmarks.studies import networks
from benchmarks.studies.networks import Setting, minibatches, spread, taylor_scores, trained
from benchmarks.studies.study import Options
from compress.graph import trace


@pytest.fixture
def options(tmp_path, monkeypatch):
    tiny = Setting(image_size=16, epochs=1, quick_epochs=1, learning_rate=0.02)
    monkeypatch.setitem(networks.SETTINGS, ("lenet3", "digits"), tiny)
    return Options(tmp_path, quick=True)


def test_a_trained_network_is_reused(options, monkeypatch):
    first, loaded = trained("lenet3", "digits", 0, options)
    assert loaded.image_shape == (1, 16, 16)
    monkeypatch.setattr(networks, "fit", lambda *args, **kwargs: pytest.fail("trained twice"))
    again, _ = trained("lenet3", "digits", 0, options)
    assert not again.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_another_seed_and_other_settings_train_anew(options, monkeypatch):
    first, _ = trained("lenet3", "digits", 0, options)
    other, _ = trained("lenet3", "digits", 1, options)
    assert not torch.equal(first.fc3.weight, other.fc3.weight)
    changed = Setting(image_size=16, epochs=1, quick_epochs=1, learning_rate=0.01)
    monkeypatch.setitem(networks.SETTINGS, ("lenet3", "digits"), changed)
    anew, _ = trained("lenet3", "digits", 0, options)
    assert not torch.equal(first.fc3.weight, anew.fc3.weight)


def test_the_same_seed_trains_the_same_network(options, tmp_path):
    first, _ = trained("lenet3", "digits", 0, options)
    second, _ = trained("lenet3", "digits", 0, Options(tmp_path / "elsewhere", quick=True))
    assert torch.equal(first.conv1.weight, second.conv1.weight)


def test_minibatches_go_on_into_further_epochs_and_repeat(options):
    _, loaded = trained("lenet3", "digits", 0, options)
    epoch = len(loaded.train)
    labels = [y for _, y in minibatches(loaded, epoch + 2, seed=5)]
    assert len(labels) == epoch + 2
    again = [y for _, y in minibatches(loaded, 2, seed=5)]
    assert all(torch.equal(one, other) for one, other in zip(labels, again, strict=False))
    assert not torch.equal(labels[0], labels[epoch])


def test_scores_move_nothing(options):
    model, loaded = trained("lenet3", "digits", 0, options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = taylor_scores(model, trace(model, torch.zeros(1, 1, 16, 16)), loaded, 2, seed=0, training=True)
    assert {name: len(values) for name, values in scores.items()} == {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_number_spread_shows_mean_and_range():
    assert spread(np.array([1.0, 2.0, 6.0]), 1) == "3.0 [1.0, 6.0]"
    assert spread(np.array([2.0])) == "2.00"
