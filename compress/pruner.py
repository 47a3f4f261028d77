"""The pruning loop: observe gradients, rank, remove; a few lines in anybody's training loop."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.budget import Budget, CostModel, cost_model
from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph, trace
from compress.graph.part import trace_part
from compress.graph.walk import Attention
from compress.importance import Importance, Minibatch, build
from compress.selection import select

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One pruning event.

    Attributes:
        index: 1 for the first.
        minibatches: minibatches observed since the start.
        loss: mean loss over the minibatches since the last event, None when `step` was not told.
        kept: the budget's quantity after the event, as a fraction of the dense network's.
        target: what `kept` should be at most after this event.
        removed: group -> original numbers of the channels removed.
        widths: group -> number of channels after the event.
        scores: group -> importance of its channels before the event, (width,) float64.
    """

    index: int
    minibatches: int
    loss: float | None
    kept: float
    target: float
    removed: dict[str, list[int]]
    widths: dict[str, int]
    scores: dict[str, Tensor] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; scores to 6 significant digits."""
        scores = {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in self.scores.items()}
        return {**vars(self), "scores": scores}


class Pruner:
    """Prunes a model while it trains.

        pruner = Pruner(model, example_inputs, budget=Budget(macs=0.5), events=10, interval=30)
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            pruner.step(optimizer)
            optimizer.step()

    Every `interval`-th call of `step` is a pruning event: channels leave the model, their gradients and the optimizer's
    state, in place. The cost falls by the same amount at each of `events` events and then meets the budget; `finished`
    is true from there on, and `step` does nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Any],
        *,
        budget: Budget,
        importance: str = "taylor",
        events: int = 10,
        interval: int = 10,
        round_to: int = 8,
        min_channels: int = 1,
        ignore: Sequence[str] = (),
        protect: Sequence[str] = (),
        tie: Sequence[tuple[str, str]] = (),
        attention: Attention = "heads",
        embedding: bool = False,
        part: str | None = None,
        graph: Literal["export", "torch-pruning"] = "export",
        momentum: float = 0.9,
    ) -> None:
        """
        Args:
            example_inputs: the positional arguments of the forward pass, the part's where one is given, for tracing; a
                tensor is one argument.
            importance: a registered criterion and its options, `NAME` or `NAME:option=value` (`importance.criterion`).
            events: number of pruning events.
            interval: minibatches from one event to the next.
            round_to: widths stay multiples of this; one that is none to begin with stays or becomes one.
            min_channels: no layer goes below this width.
            ignore: modules whose output channels stay.
            protect: modules none of whose tensors is cut.
            tie: pairs of layers whose output channels go together, i with i.
            attention: what of an attention layer can go: whole "heads", channels of all heads ("widths"), or nothing
                ("keep").
            embedding: whether channels can go that a normalisation mixes with others, such as a transformer's stream.
            part: the submodule that alone is traced and pruned, such as a detector's backbone; what it returns stays as
                it is. Names are those of the model.
            graph: what finds the channel groups; "torch-pruning" knows `ignore` alone of these options.
            momentum: of the average of scores over events.

        Raises:
            InputError: an argument is out of range, the model cannot be traced, nothing in it can be pruned, or the
                criterion cannot score it.
        """
        for name, value in (
            ("events", events),
            ("interval", interval),
            ("round_to", round_to),
            ("min_channels", min_channels),
        ):
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1.")
        self.model = model
        self.budget = budget
        self.events, self.interval = events, interval
        self.round_to, self.min_channels = round_to, min_channels
        options = {"protect": protect, "tie": tie, "attention": attention, "embedding": embedding}
        self.graph: ChannelGraph = _traced(graph, model, example_inputs, part, ignore, options)
        if not self.graph.groups:
            reasons = "; ".join(sorted({frozen.reason for frozen in self.graph.frozen}))
            raise InputError(
                f"Nothing in the model can be pruned: {reasons or 'it has no layer with channels'}; "
                "espalier inspect --groups says which option may free channels."
            )
        self.importance: Importance = build(importance, model, self.graph, momentum=momentum)
        self.cost_model: CostModel = cost_model(budget.quantity, model, self.graph)
        self.dense_cost = self.cost_model.cost(self.graph.widths)
        self.minibatches = 0
        self.history: list[Event] = []
        self._losses: list[float] = []

    @property
    def finished(self) -> bool:
        """Whether all events have taken place."""
        return len(self.history) >= self.events

    @property
    def kept(self) -> float:
        """The budget's quantity now, as a fraction of the dense network's."""
        return self.cost_model.cost(self.graph.widths) / self.dense_cost

    @property
    def excess(self) -> float:
        """By how much `kept` is above the budget; 0 or less when the budget is met."""
        return self.kept - self.budget.kept

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion reads at a step (`Importance.needs`)."""
        return self.importance.needs

    def step(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        loss: float | None = None,
        minibatch: Minibatch | None = None,
    ) -> Event | None:
        """Take in one minibatch; call between `backward()` and `optimizer.step()`.

        With a gradient scaler, unscale the gradients first: scores are squares of gradients.

        Args:
            optimizer: its state is cut together with the parameters.
            loss: the minibatch's mean loss, for the record.
            minibatch: inputs and loss function, for criteria that run the network by themselves (`needs`).

        Returns:
            The event, when one took place in this call.

        Raises:
            WorkError: a score is NaN or infinite (names the group), something that the criterion needs is not there,
                or the optimizer's state cannot be cut.
        """
        if self.finished:
            return None
        self.importance.observe(minibatch)
        self.minibatches += 1
        if loss is not None:
            self._losses.append(float(loss))
        if self.minibatches % self.interval:
            return None
        return self._prune(optimizer)

    def _prune(self, optimizer: torch.optim.Optimizer | None) -> Event:
        index = len(self.history) + 1
        target = 1 - (1 - self.budget.kept) * index / self.events
        scores = self.importance.scores()
        choice = select(
            scores,
            self.graph,
            self.cost_model,
            target * self.dense_cost,
            round_to=self.round_to,
            min_channels=self.min_channels,
        )
        removed = {name: self.graph.groups[name].kept[gone].tolist() for name, gone in choice.removals.items()}
        self._remove(choice.removals, optimizer)
        event = Event(
            index=index,
            minibatches=self.minibatches,
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            kept=self.kept,
            target=target,
            removed=removed,
            widths=self.graph.widths,
            scores={name: values.cpu() for name, values in scores.items()},
        )
        self.history.append(event)
        self._losses.clear()
        if self.finished:
            self.importance.close()
        self._report(event)
        return event

    def _remove(self, removals: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        widths = self.graph.widths
        self.graph.remove_from(self.model, removals, optimizer)
        self.importance.removed(removals, widths)

    def _report(self, event: Event) -> None:
        logger.info(
            "event %d of %d: %.1f %% of the %s kept", event.index, self.events, 100 * event.kept, self.budget.noun
        )
        if not self.finished:
            return
        if self.excess > 1e-9:
            logger.warning(
                "the budget of %.1f %% of the %s cannot be met: %.1f %% are left with every width at its smallest "
                "(round_to=%d, min_channels=%d, %d groups)",
                *(100 * self.budget.kept, self.budget.noun, 100 * event.kept),
                *(self.round_to, self.min_channels, len(self.graph.groups)),
            )
        else:
            logger.info(
                "budget met: %.2f %% of the %s kept, %.2f %% asked for",
                *(100 * event.kept, self.budget.noun, 100 * self.budget.kept),
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's weights: numbers, strings, lists, dicts and tensors."""
        return {
            "minibatches": self.minibatches,
            "losses": list(self._losses),
            "kept": {name: group.kept for name, group in self.graph.groups.items()},
            "importance": self.importance.state_dict(),
            "history": [dict(vars(event)) for event in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a freshly made pruner, and its model's widths, to where `state_dict` was taken.

        The model must be as it was when the earlier pruner was made; its weights are to be loaded afterwards.

        Raises:
            WorkError: this pruner has pruned already, or the state is of a model with other groups.
        """
        if self.history:
            raise WorkError("load_state_dict needs a pruner that has not pruned yet.")
        if state["kept"].keys() != self.graph.groups.keys():
            raise WorkError("The pruner's state belongs to a model with other channel groups.")
        removals = {
            name: (~torch.isin(group.kept, state["kept"][name])).nonzero().flatten()
            for name, group in self.graph.groups.items()
        }
        self._remove(removals, None)
        self.minibatches = state["minibatches"]
        self._losses = list(state["losses"])
        self.importance.load_state_dict(state["importance"])
        self.history = [Event(**event) for event in state["history"]]
        if self.finished:
            self.importance.close()


def _traced(
    graph: str, model: nn.Module, inputs: Any, part: str | None, ignore: Sequence[str], options: Mapping[str, Any]
) -> ChannelGraph:
    if graph == "export" and part is not None:
        return trace_part(model, part, inputs, ignore=ignore, **options)
    if graph == "export":
        return trace(model, inputs, ignore=ignore, **options)
    if graph != "torch-pruning":
        raise InputError(f"graph is {graph!r}, but must be 'export' or 'torch-pruning'.")
    if given := [name for name, value in {**options, "part": part}.items() if value and value != "heads"]:
        raise InputError(
            f"graph='torch-pruning' does not know {' and '.join(given)}: leave out, or use graph='export'."
        )
    # Imported where it is used: it loads Torch-Pruning.
    from compress.graph.second_opinion import trace as second_trace

    return second_trace(model, inputs, ignore=ignore)
