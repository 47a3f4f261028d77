"""The contract of an importance criterion, and the registry that names them."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph

_REGISTRY: dict[str, type["Importance"]] = {}

I = TypeVar("I", bound="type[Importance]")  # noqa: E741


def register(name: str) -> Callable[[I], I]:
    """Make a criterion selectable as `importance: NAME`."""

    def add(criterion: I) -> I:
        _REGISTRY[name] = criterion
        return criterion

    return add


def criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_REGISTRY)


def build(name: str, model: nn.Module, graph: ChannelGraph, **options: Any) -> "Importance":
    """The criterion `name` for the groups of `graph`.

    Raises:
        InputError: no criterion has that name.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(criteria())}."
        raise InputError(f"importance is {name!r}, which is no criterion: {hint}")
    return _REGISTRY[name](model, graph, **options)


class Importance(ABC):
    """Scores every channel of every group of a model.

    The public methods below keep the average over minibatches and events; a criterion implements `_measure`.

    Attributes:
        needs: what `observe` reads; "gradients" means the parameters' `.grad` after `backward()`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, momentum: float = 0.9) -> None:
        """
        Args:
            momentum: weight of the earlier events in the exponential average over events, in [0, 1).

        Raises:
            InputError: `momentum` is outside [0, 1).
        """
        if not 0 <= momentum < 1:
            raise InputError(f"momentum is {momentum}, but must lie in [0, 1).")
        self.model = model
        self.graph = graph
        self.momentum = momentum
        self.minibatches = 0
        self._sum: Tensor | None = None  # (all channels of all groups,) float64
        self._average: Tensor | None = None

    @abstractmethod
    def _measure(self) -> Tensor:
        """Scores of one minibatch for all channels, group after group, (channels,), float64."""

    def observe(self) -> None:
        """Take in one minibatch; call after `backward()`."""
        measured = self._measure()
        self._sum = measured if self._sum is None else self._sum.to(measured.device) + measured
        self.minibatches += 1

    def scores(self) -> dict[str, Tensor]:
        """Group -> (width,) float64, never negative: the average over events, today's minibatches included.

        Raises:
            WorkError: nothing was observed since the last event, or a score is NaN or infinite; names the group.
        """
        if self._sum is None:
            raise WorkError("No minibatch was observed since the last pruning event, so there is nothing to rank by.")
        mean = self._sum / self.minibatches
        average = mean
        if self._average is not None:
            average = self.momentum * self._average.to(mean.device) + (1 - self.momentum) * mean
        scores = dict(zip(self.graph.groups, average.split(list(self.graph.widths.values())), strict=True))
        for name, values in scores.items():
            if not bool(torch.isfinite(values).all()):
                raise WorkError(
                    f"The importance of {int((~torch.isfinite(values)).sum())} channels of {name} is NaN or infinite: "
                    "the training diverged; lower the learning rate."
                )
        self._average = average
        self._sum, self.minibatches = None, 0
        return scores

    def removed(self, removals: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
        """Forget channels that went: `removals` group -> channels, `widths` the groups' widths before."""
        if self._average is not None:
            stays = []
            for name, width in widths.items():
                mask = torch.ones(width, dtype=torch.bool)
                mask[removals.get(name, torch.empty(0, dtype=torch.int64))] = False
                stays.append(mask)
            self._average = self._average[torch.cat(stays).to(self._average.device)]
        self._sum, self.minibatches = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Running sums and averages, for a run that is resumed."""
        return {"sum": self._sum, "average": self._average, "minibatches": self.minibatches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier run; the graph must have the widths that it had then."""
        self._sum, self._average = state["sum"], state["average"]
        self.minibatches = state["minibatches"]
