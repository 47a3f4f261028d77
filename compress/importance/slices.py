"""Sums over the slices of parameters that belong to a channel, for all channels of all groups at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.graph import ChannelGraph
from compress.graph.groups import Group, Slices


@dataclass(frozen=True)
class Station:
    """One layer's share in a group: where its channels are gated, made or read, and with what factor it counts."""

    layer: str
    parts: tuple[Slices, ...]
    factor: float = 1.0


def gates(group: Group) -> tuple[Station, ...]:
    """The layers on which a group's gates stand (`Group.gates`)."""
    return _stations(group.gates)


def filters(group: Group) -> tuple[Station, ...]:
    """The weights, without biases, of the layers that make a group's channels."""
    return _stations(part for part in group.slices if (part.tensor, part.dim) in group.filters)


def _stations(parts: Iterable[Slices]) -> tuple[Station, ...]:
    layers: dict[str, list[Slices]] = {}
    for part in parts:
        layers.setdefault(layer_of(part.tensor), []).append(part)
    return tuple(Station(layer, tuple(parts)) for layer, parts in layers.items())


def layer_of(tensor: str) -> str:
    """Name of the module that holds a parameter; of a parameter of the model itself, its own name."""
    return tensor.rpartition(".")[0] or tensor


class SliceSums:
    """Sums a function of the parameters over the slices of each channel: one row for each channel of each station.

    One reduction for each parameter and one scatter for all of them together, for this runs at every training step.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, stations: Callable[[Group], Iterable[Station]] = gates
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self.stations: dict[str, tuple[Station, ...]] = {
            name: tuple(stations(group)) for name, group in graph.groups.items()
        }
        self.channels = sum(graph.widths.values())
        plan: list[tuple[str, int, Tensor, Tensor]] = []
        channel_of: list[Tensor] = []
        factors: list[float] = []
        start = row = 0
        for name, group in graph.groups.items():
            for station in self.stations[name]:
                for part in station.parts:
                    size = self._parameters[part.tensor].shape[part.dim]
                    in_order = len(part.positions) == size and bool((part.positions == torch.arange(size)).all())
                    positions = torch.empty(0, dtype=torch.int64) if in_order else part.positions
                    plan.append((part.tensor, part.dim, positions, row + part.channels))
                channel_of.append(torch.arange(start, start + group.width))
                factors += [station.factor] * group.width
                row += group.width
            start += group.width
        self._plan = plan
        self._channel_of = torch.cat(channel_of) if channel_of else torch.empty(0, dtype=torch.int64)
        self._rows = torch.cat([rows for *_, rows in plan]) if plan else torch.empty(0, dtype=torch.int64)
        self._factors = torch.tensor(factors, dtype=torch.float64)
        self._device = torch.device("cpu")

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters that stations name."""
        return {name: self._parameters[name] for name, *_ in self._plan}

    def masked(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the parameters' shapes, with 0 wherever no channel of a station stands."""
        found: dict[str, Tensor] = {}
        for name, dim, positions, _ in self._plan:
            value = values[name]
            if len(positions) == 0:
                found[name] = value
                continue
            keep = positions.to(value.device)
            kept = torch.zeros_like(value).index_copy(dim, keep, value.index_select(dim, keep))
            found[name] = found[name] + kept if name in found else kept
        return found

    def rows(self, function: Callable[[str, Tensor], Tensor]) -> Tensor:
        """(rows,) float64: `function(name, parameter)`, of the parameter's shape, summed over each row's slices."""
        self._move(next(iter(self._parameters.values())).device)
        total = torch.zeros(len(self._channel_of), dtype=torch.float64, device=self._device)
        values: dict[tuple[str, int], Tensor] = {}
        parts = []
        for name, dim, positions, _ in self._plan:
            if (name, dim) not in values:
                value = function(name, self._parameters[name].detach())
                others = [other for other in range(value.dim()) if other != dim]
                values[name, dim] = value.sum(dim=others, dtype=torch.float64) if others else value.double()
            parts.append(values[name, dim] if len(positions) == 0 else values[name, dim][positions])
        if parts:
            total.index_add_(0, self._rows, torch.cat(parts))
        return total

    def of_layers(self, values: Mapping[str, Tensor]) -> Tensor:
        """Layer -> (images, size), one value for each channel of its output; returns (images, rows) float64."""
        found = []
        for stations in self.stations.values():
            for station in stations:
                part, value = station.parts[0], values[station.layer]
                row = torch.zeros(len(value), int(part.channels.max()) + 1, dtype=torch.float64, device=value.device)
                positions, channels = part.positions.to(value.device), part.channels.to(value.device)
                found.append(row.index_add_(1, channels, value[:, positions].double()))
        return torch.cat(found, 1)

    def sum(self, rows: Tensor) -> Tensor:
        """(rows,) -> (channels,): each channel's rows, times their stations' factors, added up."""
        total = torch.zeros(self.channels, dtype=torch.float64, device=rows.device)
        return total.index_add_(0, self._channel_of, rows * self._factors)

    def sum_of_each(self, rows: Tensor) -> Tensor:
        """(images, rows) -> (images, channels): `sum` for every image."""
        self._move(rows.device)
        total = torch.zeros(len(rows), self.channels, dtype=torch.float64, device=rows.device)
        return total.index_add_(1, self._channel_of, rows * self._factors)

    def mean(self, rows: Tensor) -> Tensor:
        """(rows,) -> (channels,): mean over the stations of a channel's group."""
        return self.sum(rows) / self.sum(torch.ones_like(rows)).clamp(min=1)

    def max(self, rows: Tensor) -> Tensor:
        """(rows,) -> (channels,): maximum over the stations of a channel's group."""
        total = torch.zeros(self.channels, dtype=torch.float64, device=rows.device)
        return total.scatter_reduce_(0, self._channel_of, rows, "amax", include_self=False)

    def _move(self, device: torch.device) -> None:
        if device == self._device:
            return
        self._device = device
        self._plan = [(name, dim, positions.to(device), rows) for name, dim, positions, rows in self._plan]
        self._rows, self._channel_of = self._rows.to(device), self._channel_of.to(device)
        self._factors = self._factors.to(device)
