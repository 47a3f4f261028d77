"""First-order Taylor importance from the parameters' gradients (Molchanov et al., CVPR 2019, arXiv 1906.10771)."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from compress.errors import WorkError
from compress.graph import ChannelGraph
from compress.graph.groups import Group
from compress.importance.base import Combine, Importance, Minibatch, Need, register
from compress.importance.slices import SliceSums, Station, filters, gates, layer_of


class FromGradients(Importance):
    """A criterion on products of parameters and their gradients: no hooks and no extra pass."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max")

    _sums: SliceSums | None = None

    def _stations(self, group: Group) -> tuple[Station, ...]:
        return gates(group)

    def _summed(self) -> SliceSums:
        if self._sums is None:
            self._sums = SliceSums(self.model, self.graph, self._stations)
        return self._sums

    def _gradient_rows(self, sums: SliceSums) -> Tensor:
        """(rows,): the sum of parameter times gradient over each row's slices, a gate's gradient."""
        parameters = sums.tensors
        return sums.rows(lambda name, value: times_gradient(name, value, parameters[name]))

    def _widths_changed(self) -> None:
        self._sums = None


def times_gradient(name: str, parameter: Tensor, model_parameter: nn.Parameter) -> Tensor:
    """Elementwise product of a parameter and its gradient; WorkError where it has none."""
    if model_parameter.grad is None:
        raise WorkError(
            f"{name} has no gradient, so its channels cannot be scored: call pruner.step() after "
            "loss.backward(), unfreeze the layer, or name it in ignore."
        )
    return parameter * model_parameter.grad


@register("taylor")
class Taylor(FromGradients):
    """Squared gradient of a gate that stands on the channel, `(∂E/∂z_c)²` (equation 8 of the paper, on gates).

    On one minibatch with mean loss E the gate's gradient is `∂E/∂z_c = Σ_p Σ_{s∈θ_{p,c}} s · ∂E/∂s`, where θ_{p,c} are
    the affine pair (γ_c, β_c) of the normalisation that follows producer p or, where none follows, filter c of p and
    its bias (`Group.gates`). The squares are averaged over minibatches.

    Combine: `joint` adds the producers' gradients up, then squares; `mean` and `max` square the gradient of each
    producer's own gate first. `shared-gate` is what the authors' code does (github.com/NVlabs/Taylor_pruning,
    `pruning_engine.py`, method 22): one gate stands behind every addition to a residual stream, all of one value; the
    square of its gradient is divided by the number of places. Its gradient follows from those of the producers and of
    the readers: behind the b-th addition it is what all later readers receive less what later producers add.
    """

    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max", "shared-gate")

    def _stations(self, group: Group) -> tuple[Station, ...]:
        return tuple(_shared(group)) if self.combine == "shared-gate" else gates(group)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        sums = self._summed()
        rows = self._gradient_rows(sums)
        if self.combine in ("joint", "shared-gate"):
            return sums.sum(rows).square_()
        squares = rows.square_()
        return sums.mean(squares) if self.combine == "mean" else sums.max(squares)


def _shared(group: Group) -> list[Station]:
    """Gates and readers with the factors that make their sum the gradient of the one gate behind every addition.

    With E's gradient G_p at the gate of producer p and C_k at reader k (the sum over its weights' slice of s · ∂E/∂s),
    the gate behind addition b receives Σ_{k behind b} C_k − Σ_{p added after b} G_p. Summed over all b every reader
    counts once for each addition before it, and every producer, negatively, once for each addition before its own.
    """
    stations: list[Station] = []
    additions = 0
    reading = True
    gating = {(part.tensor, part.dim): part for part in group.gates}
    for part in group.slices:
        slot = (part.tensor, part.dim)
        if slot in gating:
            additions += reading
            reading = False
            stations.append(Station(layer_of(part.tensor), (gating[slot],), -(additions - 1.0)))
        elif slot in group.readers:
            reading = True
            stations.append(Station(layer_of(part.tensor), (part,), float(additions)))
    if not any(slot in group.readers for slot in {(part.tensor, part.dim) for part in group.slices}):
        return list(gates(group))
    # The square is divided by the number of additions.
    return [replace(station, factor=station.factor / additions**0.5) for station in stations]


@register("taylor-weight")
class TaylorWeight(FromGradients):
    """Squared first-order term of every single weight, `Σ_{i∈filter} (w_i · ∂E/∂w_i)²` (equation 8, on weights).

    Over the weights, without biases, of every layer that makes the channel; averaged over minibatches.
    Combine: `joint` adds the producers' sums up.
    """

    def _stations(self, group: Group) -> tuple[Station, ...]:
        return filters(group)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        sums = self._summed()
        parameters = sums.tensors
        rows = sums.rows(lambda name, value: times_gradient(name, value, parameters[name]).square_())
        return combined(sums, rows, self.combine)


@register("bn-taylor")
class BatchNormTaylor(FromGradients):
    """First-order term of a normalisation's affine pair, `(γ_c · ∂E/∂γ_c + β_c · ∂E/∂β_c)²` (section 3.2 of the paper).

    Every normalisation that gates the channel is handled singly; averaged over minibatches.
    Combine: `joint` adds the squares up.
    """

    def _unscorable(self) -> dict[str, str]:
        return without_normalisation(self.model, self.graph)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        sums = self._summed()
        return combined(sums, self._gradient_rows(sums).square_(), self.combine)


def without_normalisation(model: nn.Module, graph: ChannelGraph) -> dict[str, str]:
    """Group -> the layers that gate it and are no normalisation with a scale."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    found = {}
    for name, group in graph.groups.items():
        bare = [station.layer for station in gates(group) if not isinstance(_module(model, station.layer), norms)]
        if bare:
            found[name] = f"no normalisation layer follows {', '.join(bare)}"
    return found


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def combined(sums: SliceSums, rows: Tensor, how: Combine) -> Tensor:
    """(rows,) -> (channels,) for a criterion whose joint rule is the sum of its producers' scores."""
    return {"joint": sums.sum, "mean": sums.mean, "max": sums.max}[how](rows)
