"""Scores of several criteria on the same network and the same minibatches."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph
from compress.importance.base import Importance, Minibatch, build
from compress.modes import evaluation_mode
from compress.progress import progress_bar


@dataclass(frozen=True)
class Scores:
    """What one criterion gave.

    Attributes:
        values: group -> (width,) float64.
        seconds: that the criterion itself took for one minibatch; the backward pass that all share is not in it.
    """

    values: dict[str, Tensor]
    seconds: float


def build_all(
    names: Iterable[str], model: nn.Module, graph: ChannelGraph, *, skip_unscorable: bool = False
) -> tuple[dict[str, Importance], dict[str, str]]:
    """The criteria `names` (`importance.criterion`), and name -> why not for those that cannot score the model.

    Raises:
        InputError: a name or option is wrong, or, unless they are to be skipped, a criterion cannot score the model.
    """
    built: dict[str, Importance] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            built[name] = build(name, model, graph, momentum=0.0)
        except InputError as error:
            if not skip_unscorable:
                for importance in built.values():
                    importance.close()
                raise
            skipped[name] = str(error)
    return built, skipped


def score(
    model: nn.Module, importances: Mapping[str, Importance], minibatches: Sequence[Minibatch]
) -> tuple[dict[str, Scores], float]:
    """Let criteria observe the same minibatches, in evaluation mode; weights stay, gradients are left cleared.

    In evaluation mode, because that is the network whose channels are removed: batch normalisation uses the statistics
    that it will be served with.

    Returns:
        The scores by name, and the seconds of one forward and backward pass.
    """
    seconds = dict.fromkeys(importances, 0.0)
    passes = 0.0
    wants_backward = any(importance.needs & {"gradients", "activations"} for importance in importances.values())
    with evaluation_mode(model), progress_bar("criteria: minibatches", len(minibatches)) as bar:
        for minibatch in minibatches:
            if wants_backward:
                start = time.perf_counter()
                model.zero_grad()
                with torch.enable_grad():
                    minibatch.loss(model(*minibatch.inputs)).backward()
                passes += time.perf_counter() - start
            for name, importance in importances.items():
                start = time.perf_counter()
                importance.observe(minibatch)
                seconds[name] += time.perf_counter() - start
            bar.advance("")
        model.zero_grad()
        found = {}
        for name, importance in importances.items():
            start = time.perf_counter()
            values = {group: value.cpu() for group, value in importance.scores().items()}
            seconds[name] += time.perf_counter() - start
            importance.close()
            found[name] = Scores(values, seconds[name] / len(minibatches))
    return found, passes / len(minibatches)
