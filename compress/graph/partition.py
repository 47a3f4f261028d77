"""Which labels name the same channel, which channels go together, and which must stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from compress.graph.labels import NO_CHANNEL, compact, varying


@dataclass
class Partition:
    """Statements about labels, gathered while the walk goes on; `classes` draws the conclusion.

    Attributes:
        count: number of labels given out.
    """

    count: int = field(default=0, init=False)
    _same: list[Tensor] = field(default_factory=list, init=False)
    _tied: list[Tensor] = field(default_factory=list, init=False)
    _grids: list[Tensor] = field(default_factory=list, init=False)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list, init=False)
    _residue: list[tuple[Tensor, str]] = field(default_factory=list, init=False)
    _mixed: list[tuple[Tensor, str]] = field(default_factory=list, init=False)
    _arrivals: list[tuple[frozenset[str], Tensor]] = field(default_factory=list, init=False)

    def new(self, count: int) -> Tensor:
        """`count` fresh labels, shape (count,)."""
        labels = torch.arange(self.count, self.count + count)
        self.count += count
        return labels

    def join(self, first: Tensor, second: Tensor) -> None:
        """Elements at the same place belong to the same channel; shapes must broadcast."""
        _append(self._same, first, second)

    def together(self, first: Tensor, second: Tensor) -> None:
        """Elements at the same place belong to channels that can only go together; shapes must broadcast."""
        _append(self._tied, first, second)

    def whole(self, labels: Tensor, dim: int, reason: str, *, same: bool = False) -> None:
        """Positions along `dim` stay or go all at once.

        Where labels follow another axis too (the heads of an attention layer), what lies along `dim` is tied; where
        they follow `dim` alone, nothing of it can go, for the reason given.

        Args:
            same: what lies along `dim` becomes one value, so that from here on it is one channel.
        """
        axes = varying(labels)
        if dim not in axes:
            return
        if len(axes) == 1:
            self.freeze(labels, reason)
        else:
            (self.join if same else self.together)(labels, labels.narrow(dim, 0, 1))

    def grid(self, labels: Tensor) -> None:
        """Channels stand on several axes, and what is left of them must fill a rectangle again.

        How it is cut is decided in the end: where everything along an axis turns out to be tied (an attention head),
        whole rows go; otherwise whole columns, positions along the last axis.
        """
        self._grids.append(compact(labels))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Never remove the channels that these labels name; `reason` is reported to the user."""
        labels = _named(labels)
        if len(labels):
            self._frozen.append((labels, reason))

    def stays(self, labels: Tensor) -> bool:
        """Whether each of these channels has been frozen by name; those tied to them are not looked for."""
        if not self._frozen:
            return False
        return bool(torch.isin(_named(labels), torch.cat([frozen for frozen, _ in self._frozen])).all())

    def mix(self, labels: Tensor, layer: str) -> None:
        """`layer` mixes these channels: without one of them the others have other values."""
        self._mixed.append((_named(labels), layer))

    def leave(self, labels: Tensor, layer: str) -> None:
        """`layer` reads something other than 0 from a gated channel."""
        self._residue.append((_named(labels), layer))

    def arrive(self, gates: frozenset[str], labels: Tensor) -> None:
        """A consumer reads these channels directly behind these gates."""
        if gates:
            self._arrivals.append((gates, _named(labels)))

    # --- conclusions --------------------------------------------------------------------------------------------

    def classes(self) -> np.ndarray:
        """(count,) int array: labels with equal entries go together."""
        grids = list(self._grids)
        while True:
            classes = _components(self._same + self._tied, self.count)
            ragged = [grid for grid in grids if len(_axes(grid, classes)) > 1]
            if not ragged:
                return classes
            for grid in ragged:
                for dim in _axes(grid, classes)[:-1]:
                    self.together(grid, grid.narrow(dim, 0, 1))
            grids = [grid for grid in grids if not any(grid is other for other in ragged)]

    def arrived(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(count,) labels with equal entries name one channel; and gate -> the channels read directly behind it."""
        channels = _components(self._same, self.count)
        read: dict[str, list[np.ndarray]] = {}
        for gates, labels in self._arrivals:
            found = channels[labels.numpy()]
            for gate in gates:
                read.setdefault(gate, []).append(found)
        return channels, {gate: np.unique(np.concatenate(found)) for gate, found in read.items()}

    def frozen_classes(self, classes: np.ndarray) -> dict[int, str]:
        """Class -> why it is frozen."""
        return _marks(self._frozen, classes)

    def residue_classes(self, classes: np.ndarray) -> dict[int, str]:
        """Class -> which layer reads a value that zeroing leaves behind."""
        return _marks(self._residue, classes)

    def mixed_classes(self, classes: np.ndarray) -> dict[int, str]:
        """Class -> which layer mixes it with others."""
        return _marks(self._mixed, classes)


def _append(pairs_of: list[Tensor], first: Tensor, second: Tensor) -> None:
    first, second = torch.broadcast_tensors(compact(first), compact(second))
    pairs = torch.stack([first.flatten(), second.flatten()])
    pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != NO_CHANNEL).all(dim=0)]
    if pairs.shape[1]:
        pairs_of.append(pairs)


def _named(labels: Tensor) -> Tensor:
    labels = compact(labels).flatten()
    return labels[labels != NO_CHANNEL].unique()


def _components(edges: Sequence[Tensor], count: int) -> np.ndarray:
    if not edges:
        return np.arange(count)
    pairs = torch.cat(list(edges), dim=1).numpy()
    graph = coo_array((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), (count, count))
    return connected_components(graph, directed=False)[1]


def _axes(grid: Tensor, classes: np.ndarray) -> list[int]:
    """The axes of a grid of labels along which channels differ."""
    labels = grid.numpy()
    found = np.where(labels == NO_CHANNEL, NO_CHANNEL, classes[labels])
    return [dim for dim in range(found.ndim) if (found != found.take([0], axis=dim)).any()]


def _marks(statements: Sequence[tuple[Tensor, str]], classes: np.ndarray) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, text in statements:
        for one in np.unique(classes[labels.numpy()]).tolist():
            found.setdefault(int(one), text)
    return found
