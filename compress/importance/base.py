"""The contract of an importance criterion, and the registry that names them."""

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph
from compress.options_text import read_options

_REGISTRY: dict[str, type["Importance"]] = {}

I = TypeVar("I", bound="type[Importance]")  # noqa: E741

Need = Literal["gradients", "activations", "minibatch"]
"""What a criterion reads at `observe`.

gradients: the parameters' `.grad`, left by `backward()` of the minibatch's mean loss.
activations: activations and their gradients, which it takes by itself while the minibatch runs forward and back.
minibatch: the inputs and the loss function, to run the network by itself.
"""

Combine = Literal["joint", "mean", "max", "shared-gate"]
"""How the scores of a group's producers become one; `joint` is the criterion's own rule, given in its formula."""


@dataclass(frozen=True)
class Minibatch:
    """What a criterion needs to run the network by itself.

    Attributes:
        inputs: positional arguments of the forward pass.
        loss: the model's output -> mean loss over the images, a scalar; of the outputs of any number of copies of the
            inputs it is asked for one copy at a time.
    """

    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor]

    @property
    def images(self) -> int:
        """Number of images: the length of the first tensor, or of the first list of images (C, H, W), among the inputs.

        Raises:
            WorkError: there is neither.
        """
        for value in self.inputs:
            images = value if isinstance(value, list | tuple) else ()
            if images and all(isinstance(one, Tensor) and one.dim() == 3 for one in images):
                return len(images)
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.dim():
                    return len(leaf)
        raise WorkError("no tensor is among the inputs of the minibatch.")


def register(name: str) -> Callable[[I], I]:
    """Make a criterion selectable as `importance: NAME`."""

    def add(criterion: I) -> I:
        criterion.name = name
        _REGISTRY[name] = criterion
        return criterion

    return add


def criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_REGISTRY)


def criterion(text: str) -> tuple[type["Importance"], dict[str, Any]]:
    """The criterion that `text` names, and its options: `NAME` or `NAME:option=value:option=value`.

    An option's value has the type of its default: `taylor:combine=mean:momentum=0`, `hessian:samples=4`.

    Raises:
        InputError: there is no criterion or no option of that name, or a value does not fit.
    """
    name, *parts = text.split(":")
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(criteria())}."
        raise InputError(f"importance is {name!r}, which is no criterion: {hint}")
    return _REGISTRY[name], read_options(name, parts, _options(_REGISTRY[name]))


def build(text: str, model: nn.Module, graph: ChannelGraph, **options: Any) -> "Importance":
    """The criterion that `text` names (see `criterion`) for the groups of `graph`.

    Args:
        options: of the criterion; those that `text` gives go before these.

    Raises:
        InputError: the name or an option is wrong, or the criterion cannot score the model; names the layers.
    """
    kind, given = criterion(text)
    return kind(model, graph, **{**options, **given})


def _options(kind: type["Importance"]) -> dict[str, Any]:
    """Option -> its default."""
    return {
        name: parameter.default
        for cls in reversed(kind.__mro__)
        if issubclass(cls, Importance) and "__init__" in vars(cls)
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


class Importance(ABC):
    """Scores every channel of every group of a model.

    The public methods below keep the average over minibatches and events; a criterion implements `_measure`.

    Attributes:
        name: in the registry.
        needs: what `observe` reads. A criterion that needs nothing looks at the weights alone, at each event.
        combines: the rules that it can combine a group's producers by.
        signed: whether scores may be negative: removing the channel promises to lower the loss.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    combines: ClassVar[tuple[Combine, ...]] = ("joint",)
    signed: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        *,
        momentum: float = 0.9,
        combine: Combine = "joint",
        normalise: bool = False,
    ) -> None:
        """
        Args:
            momentum: weight of the earlier events in the exponential average over events, in [0, 1). Scores that are
                read off the weights alone have nothing to average.
            combine: how the scores of a group's producers become one; see `combines` for what a criterion offers.
            normalise: divide each group's scores by their l2 norm (Molchanov et al. 2017, arXiv 1611.06440, eq. 8).

        Raises:
            InputError: an option is out of range, or the criterion cannot score some group; names the layers.
        """
        if not 0 <= momentum < 1:
            raise InputError(f"momentum is {momentum}, but must lie in [0, 1).")
        if combine not in get_args(Combine):
            raise InputError(f"combine is {combine!r}, but must be one of {', '.join(get_args(Combine))}.")
        if combine not in self.combines:
            raise InputError(
                f"combine is {combine!r}, which {self.name} does not offer: choose one of {', '.join(self.combines)}."
            )
        self.model = model
        self.graph = graph
        self.momentum = momentum
        self.combine = combine
        self.normalise = normalise
        self.minibatches = 0
        self._sum: Tensor | None = None  # (all channels of all groups,) float64
        self._average: Tensor | None = None
        self._refuse()

    @abstractmethod
    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        """Scores of one minibatch for all channels, group after group, (channels,), float64."""

    def _unscorable(self) -> dict[str, str]:
        """Group -> why the criterion cannot score it, with the layers in question."""
        return {}

    def observe(self, minibatch: Minibatch | None = None) -> None:
        """Take in one minibatch; call after `backward()`.

        Raises:
            WorkError: something in `needs` is not there.
        """
        if "minibatch" in self.needs and minibatch is None:
            raise WorkError(
                f"The criterion {self.name} runs the network by itself: give pruner.step the minibatch, as "
                "minibatch=compress.Minibatch(inputs, loss)."
            )
        self.minibatches += 1
        if self.needs:
            measured = self._measure(minibatch)
            self._sum = measured if self._sum is None else self._sum.to(measured.device) + measured

    def scores(self) -> dict[str, Tensor]:
        """Group -> (width,) float64, more important is larger: the average over events, today's minibatches included.

        Never negative, but where `signed` says so. With several processes it is the average over them all.

        Raises:
            WorkError: nothing was observed since the last event, or a score is NaN or infinite; names the group.
        """
        if self.minibatches == 0:
            raise WorkError("No minibatch was observed since the last pruning event, so there is nothing to rank by.")
        if self._sum is None:
            average = self._measure(None)
        else:
            average = _over_processes(self._sum / self.minibatches, next(self.model.parameters()).device)
            if self._average is not None:
                average = self.momentum * self._average.to(average.device) + (1 - self.momentum) * average
        scores = dict(zip(self.graph.groups, average.split(list(self.graph.widths.values())), strict=True))
        for name, values in scores.items():
            if not bool(torch.isfinite(values).all()):
                raise WorkError(
                    f"The importance of {int((~torch.isfinite(values)).sum())} channels of {name} is NaN or infinite: "
                    "the training diverged; lower the learning rate."
                )
        if self._sum is not None:
            self._average = average
        self._sum, self.minibatches = None, 0
        if self.normalise:
            tiny = torch.finfo(torch.float64).tiny
            scores = {name: values / values.norm().clamp(min=tiny) for name, values in scores.items()}
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
        self._widths_changed()

    def _widths_changed(self) -> None:  # noqa: B027  most criteria derive nothing
        """Channels went, or an earlier state came: whatever was derived from the graph is to be derived anew."""

    def close(self) -> None:  # noqa: B027  most criteria hold nothing
        """Let go of the model; called when pruning is finished."""

    def state_dict(self) -> dict[str, Any]:
        """Running sums and averages, for a run that is resumed."""
        return {"sum": self._sum, "average": self._average, "minibatches": self.minibatches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier run; the graph must have the widths that it had then."""
        self._sum, self._average = state["sum"], state["average"]
        self.minibatches = state["minibatches"]
        self._widths_changed()

    def _refuse(self) -> None:
        reasons = self._unscorable()
        if reasons:
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            raise InputError(
                f"{self.name} cannot score {len(reasons)} of {len(self.graph.groups)} channel groups ({listed}{more}): "
                "choose another criterion, or name these layers in ignore."
            )


def _over_processes(values: Tensor, device: torch.device) -> Tensor:
    """The mean over all processes that train together, so that all of them remove the same channels.

    Args:
        device: where the processes exchange tensors, that of the model.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return values
    values = values.to(device, copy=True)
    distributed.all_reduce(values)
    return values / distributed.get_world_size()
