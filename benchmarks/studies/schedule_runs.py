"""One network pruned by one schedule: what the study `schedule` runs for every network, seed and regime."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.studies.networks import minibatches, taylor_scores
from compress.budget import Budget
from compress.data import Data
from compress.graph import ChannelGraph
from compress.importance import Taylor
from compress.pruner import Pruner
from compress.training import TrainingConfig, evaluate, fit
from compress.training.schedule import build_optimizer

Regime = Literal["fixed", "trained"]

REGIMES: dict[Regime, str] = {"fixed": "(a) weights fixed", "trained": "(b) training between events"}
MINIBATCHES = 64
"""Minibatches that every schedule sees until its last event."""
BETWEEN = TrainingConfig(learning_rate=0.01, weight_decay=5e-4, schedule="constant")
AFTER = TrainingConfig(epochs=2, learning_rate=0.02, weight_decay=5e-4, nesterov=True)


@dataclass(frozen=True)
class Schedule:
    """When channels go, and by which scores.

    Attributes:
        events: pruning events, each after an equal share of the minibatches; 1 is one-shot pruning.
        momentum: of the average of scores over events; it changes nothing where there is one event.
        frozen: the channels are ranked once, on the dense network over all the minibatches that the other schedules
            see in the course of pruning, and go in that order.
    """

    events: int
    momentum: float
    frozen: bool = False

    @property
    def key(self) -> str:
        return f"{self.events}-events-" + ("frozen" if self.frozen else f"momentum={self.momentum:g}")


ONE_SHOT = Schedule(1, 0.0)
ITERATIVE = Schedule(16, 0.9)
"""Stands for iterative pruning where one is to be named: the power of two next to the 10 events of `Pruner`."""
FROZEN = Schedule(16, 0.0, frozen=True)


class Frozen(Taylor):
    """Scores that stay what they were on the dense network, whatever is removed and trained since."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, first: Mapping[str, Tensor]) -> None:
        """
        Args:
            first: group -> scores of all the dense network's channels.
        """
        super().__init__(model, graph)
        self._first = first

    def observe(self, minibatch: object = None) -> None:
        """Nothing new is learnt from a minibatch."""

    def scores(self) -> dict[str, Tensor]:
        return {name: self._first[name][group.kept] for name, group in self.graph.groups.items()}

    def removed(self, removals: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
        """`Group.kept` says which channels are left."""


def prune(dense: nn.Module, loaded: Data, regime: Regime, schedule: Schedule, kept: float, seed: int) -> dict[str, Any]:
    """Prune a copy of `dense`; test loss and accuracy after every event of the named schedules, else after the last.

    In regime (a) the network runs in evaluation mode, so that the statistics of its batch normalisation stay too.
    Returns: `curve`, a list of {channels, top1 in percent, loss in nats, …}; `tuned`, the same after fine-tuning;
    `kept`, group -> channels left, by their number in the dense network.
    """
    model = deepcopy(dense)
    training = regime == "trained"
    pruner = Pruner(
        model,
        torch.zeros(1, *loaded.image_shape),
        budget=Budget(channels=kept),
        events=schedule.events,
        interval=MINIBATCHES // schedule.events,
        round_to=1,
        min_channels=1,
        momentum=schedule.momentum,
    )
    if schedule.frozen:
        first = taylor_scores(model, pruner.graph, loaded, MINIBATCHES, seed=seed, training=training)
        pruner.importance = Frozen(model, pruner.graph, first)
    model.train(training)
    optimizer = build_optimizer(model, BETWEEN) if training else None
    curve = []
    for images, labels in minibatches(loaded, MINIBATCHES, seed=seed):
        model.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        event = pruner.step(optimizer, loss=loss.item())
        if event is not None and (pruner.finished or schedule in (ITERATIVE, FROZEN)):
            curve.append({"channels": sum(event.widths.values()), **asdict(evaluate(model, loaded.test))})
        if optimizer is not None and not pruner.finished:
            optimizer.step()
    left = {name: group.kept.tolist() for name, group in pruner.graph.groups.items()}
    fit(model, loaded.train, AFTER, seed=seed, description="fine-tuning")
    return {"curve": curve, "tuned": asdict(evaluate(model, loaded.test)), "kept": left}
