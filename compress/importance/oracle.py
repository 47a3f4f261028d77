"""The ground truth: the measured change of loss when channels are removed.

Molchanov et al., CVPR 2019 (arXiv 1906.10771), section 3 ("oracle") and appendix; natural importance of Li et al. 2020
(arXiv 2006.10903), section 2.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import InputError
from compress.files import replacing
from compress.graph import ChannelGraph
from compress.importance.ablation import AblatedMinibatch, Ablation
from compress.importance.base import Importance, Minibatch, Need, register
from compress.progress import Bar, progress_bar

Reduction = Literal["squared", "absolute", "signed"]
"""How the changes of loss of the minibatches become one score: mean of (ΔE)², of |ΔE|, or of ΔE."""

_SAVE_SECONDS = 10.0
"""A resumable measurement is written to disk this often."""


def reduce(changes: Tensor, reduction: Reduction) -> Tensor:
    """(minibatches, channels) changes of loss -> (channels,) natural importance."""
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "squared": torch.square,
        "absolute": torch.abs,
        "signed": lambda values: values,
    }
    return reductions[reduction](changes).mean(0)


def changes_of_loss(
    model: nn.Module,
    graph: ChannelGraph,
    minibatches: Sequence[Minibatch],
    *,
    saved: Path | None = None,
    identity: str = "",
) -> Tensor:
    """The change of loss, `E without the channel − E`, of every channel alone, on every minibatch.

    Shows a progress bar. The network runs in evaluation mode.

    Args:
        saved: a file in which finished channels are kept, so that a killed measurement goes on where it was.
        identity: what the file must have been made for (weights, data); with another one it is begun anew.

    Returns:
        (minibatches, channels of all groups) float64.
    """
    channels = sum(graph.widths.values())
    changes = torch.full((len(minibatches), channels), torch.nan, dtype=torch.float64)
    if saved is not None:
        earlier = _read(saved, identity)
        if earlier is not None and earlier.shape == changes.shape:
            changes = earlier
    ablation: Ablation | None = None
    written = time.monotonic()
    with progress_bar("oracle: channels removed", changes.numel()) as bar:
        bar.skip_to(int((~changes.isnan()).sum()))
        for row, minibatch in zip(changes, minibatches, strict=True):
            if not bool(row.isnan().any()):
                continue
            if ablation is None:
                ablation = Ablation(model, graph, minibatch)
            state = ablation.on(minibatch)
            for part, change in _changes(state, graph, bar, skip=~row.isnan()):
                row[part] = change
                if saved is not None and time.monotonic() - written > _SAVE_SECONDS:
                    _write(saved, changes, identity)
                    written = time.monotonic()
    if saved is not None:
        _write(saved, changes, identity)
    return changes


def _changes(
    state: AblatedMinibatch, graph: ChannelGraph, bar: Bar | None = None, skip: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Group by group: the group's place among all channels, and the changes of loss of its channels."""
    start = 0
    for name, group in graph.groups.items():
        part = slice(start, start + group.width)
        start += group.width
        if skip is not None and bool(skip[part].all()):
            continue

        def done(count: int, name: str = name) -> None:
            if bar is not None:
                bar.advance(name, count)

        masks = 1 - torch.eye(group.width, dtype=torch.float64)
        with torch.no_grad():
            yield part, state.losses({name: masks}, done=done).cpu() - state.loss


@register("oracle")
class Oracle(Importance):
    """Measured change of loss when the channel is removed, `(E without c − E)²`, averaged over minibatches.

    reduction=squared, absolute (`|E without c − E|`) or signed. One ablation for each channel at every minibatch that
    is observed: the dearest criterion there is, and the one that the others are judged by.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"minibatch"})

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, *, reduction: Reduction = "squared", **options: Any
    ) -> None:
        """
        Args:
            reduction: what is averaged over minibatches: the squared, absolute or signed change.

        Raises:
            InputError: another reduction.
        """
        if reduction not in get_args(Reduction):
            raise InputError(f"reduction is {reduction!r}, but must be one of {', '.join(get_args(Reduction))}.")
        self.reduction = reduction
        self.signed = reduction == "signed"  # type: ignore[misc]  # the class attribute is the default
        super().__init__(model, graph, **options)
        self._ablation: Ablation | None = None

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        if self._ablation is None:
            self._ablation = Ablation(self.model, self.graph, minibatch)
        changes = torch.cat([change for _, change in _changes(self._ablation.on(minibatch), self.graph)])
        return reduce(changes[None], self.reduction)

    def _widths_changed(self) -> None:
        self._ablation = None


@dataclass(frozen=True)
class Removed:
    """A set of channels of one or more groups, and the loss without it.

    Attributes:
        channels: (group, channel), in the order of removal where there is one.
        loss: mean over the minibatches.
    """

    channels: tuple[tuple[str, int], ...]
    loss: float


def greedy(
    states: Sequence[AblatedMinibatch], graph: ChannelGraph, count: int, *, groups: Sequence[str] | None = None
) -> list[Removed]:
    """Remove the channel whose removal leaves the lowest loss, measure all others again, and so on.

    Args:
        states: the minibatches, as `Ablation.on` gives them.
        count: channels to remove; one channel of every group stays.
        groups: those that may lose channels; all if not given.

    Returns:
        After 1, 2, ... channels: all that are gone, and the loss.
    """
    names = list(graph.groups if groups is None else groups)
    present = {name: torch.ones(graph.groups[name].width, dtype=torch.float64) for name in names}
    gone: list[tuple[str, int]] = []
    found = []
    with progress_bar("greedy oracle", count) as bar, torch.no_grad():
        for _ in range(count):
            best: tuple[float, str, int] | None = None
            for name in names:
                left = present[name].nonzero().flatten()
                if len(left) < 2:
                    continue
                masks = {
                    other: mask.repeat(len(left), 1)
                    for other, mask in present.items()
                    if other == name or bool((mask == 0).any())
                }
                masks[name][torch.arange(len(left)), left] = 0
                losses = _mean_losses(states, masks)
                at = int(losses.argmin())
                if best is None or float(losses[at]) < best[0]:
                    best = (float(losses[at]), name, int(left[at]))
            if best is None:
                break
            loss, name, channel = best
            present[name][channel] = 0
            gone.append((name, channel))
            found.append(Removed(tuple(gone), loss))
            bar.advance(f"{name} {channel}")
    return found


def combinatorial(
    states: Sequence[AblatedMinibatch], graph: ChannelGraph, group: str, count: int, *, limit: int = 200_000
) -> Removed:
    """The best set of `count` channels of one small group to remove: every subset is measured.

    Args:
        states: the minibatches, as `Ablation.on` gives them.
        limit: subsets that may be measured.

    Raises:
        InputError: `count` does not leave a channel, or there are more subsets than `limit`.
    """
    width = graph.groups[group].width
    if not 0 < count < width:
        raise InputError(f"count is {count}, but of the {width} channels of {group} at least one must go and one stay.")
    subsets = comb(width, count)
    if subsets > limit:
        raise InputError(
            f"{group} has {subsets} subsets of {count} of its {width} channels, more than {limit}: use greedy."
        )
    best = Removed((), float("inf"))
    every = combinations(range(width), count)
    with progress_bar(f"subsets of {count}", subsets) as bar, torch.no_grad():
        while part := list(islice(every, 1024)):
            masks = torch.ones(len(part), width, dtype=torch.float64)
            masks.scatter_(1, torch.tensor(part), 0.0)
            losses = _mean_losses(states, {group: masks})
            at = int(losses.argmin())
            if float(losses[at]) < best.loss:
                best = Removed(tuple((group, channel) for channel in part[at]), float(losses[at]))
            bar.advance(f"loss {best.loss:.4g}", len(part))
    return best


def _mean_losses(states: Sequence[AblatedMinibatch], masks: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([state.losses(masks).cpu() for state in states]).mean(0)


def _write(path: Path, changes: Tensor, identity: str) -> None:
    with replacing(path) as temporary:
        save_file({"changes": changes}, temporary, metadata={"identity": identity})


def _read(path: Path, identity: str) -> Tensor | None:
    """What an earlier measurement left, None where there is none or it is of something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None
            return file.get_tensor("changes")
    except (SafetensorError, OSError):
        return None
