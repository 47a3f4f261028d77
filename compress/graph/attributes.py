"""The search for attributes that must follow a removal.

A forward pass that reads a size from an attribute fails, or cuts its tensors at other places, once the tensors are
smaller. Candidates are the integers that it reads (every read of a module's attribute is watched once) and that are a
plain multiple or part of the size of a tensor that is cut. They are tried on fake tensors; those are kept without which
the forward pass fails.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.attributes import Attribute, AttributeRule, is_plain, is_size
from compress.graph.groups import ChannelGraph
from compress.graph.skeleton import Skeleton
from compress.removal import SHAPE_UPDATES, Slot

RATIOS = tuple(Fraction(*pair) for pair in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1)))
"""What an attribute may be of a size, the likeliest first; also the number of channels that a size belongs to."""

LEAST_RUNS, MOST_RUNS, OPERATORS, WALKS = 20, 100, 30_000, 24
"""How many forward passes, operators in all of them, and walks one search may take, so that a hopeless one ends: an
operator on fake tensors takes some 0.1 ms, a walk through a large network 1 s."""


@dataclass(frozen=True)
class Kind:
    """Attributes of one name in modules of one type, which follow the same dimension by the same ratio in each.

    Attributes:
        target: type of the modules, the attribute's name from the module on that holds the tensor, and its index.
        relative: the tensor's name from there, and the dimension.
    """

    target: tuple[type, str, int | None]
    relative: Slot
    ratio: Fraction


Kinds = dict[Kind, tuple[AttributeRule, ...]]


def candidates(model: nn.Module, reads: Iterable[Attribute], graph: ChannelGraph) -> Kinds:
    """What the attributes that are read may follow, the likeliest first.

    Args:
        model: before the cut.
        graph: its groups.
    """
    makeup = _makeup(graph)
    found: dict[Kind, list[AttributeRule]] = {}
    ranks: dict[Kind, tuple[int, int]] = {}
    for attribute in reads:
        value = attribute.value(model)
        if value is None or value < 2:  # a size of 1 never shrinks
            continue
        above = attribute.module
        while above and not _inside(above, makeup):
            above = above.rpartition(".")[0]
        place = attribute.module.removeprefix(above)
        met: set[Any] = set()
        for slot in sorted(_inside(above, makeup), key=lambda slot: slot[0].count(".")):
            ratio, parts = Fraction(value, graph.sizes[slot]), makeup[slot]
            plain = ratio in RATIOS or any(value == graph.groups[name].width for name, _ in parts)
            if not plain or (ratio, parts) in met:
                continue
            met.add((ratio, parts))  # another dimension of the same channels would say the same
            target = (type(model.get_submodule(attribute.module)), f"{place}.{attribute.name}", attribute.index)
            kind = Kind(target, (slot[0].removeprefix(f"{above}."), slot[1]), ratio)
            found.setdefault(kind, []).append(AttributeRule(attribute, slot, ratio))
            rank = RATIOS.index(ratio) if ratio in RATIOS else len(RATIOS)
            ranks.setdefault(kind, (rank, slot[0].count(".") - above.count(".")))
    return {kind: tuple(found[kind]) for kind in sorted(found, key=lambda kind: ranks[kind])}


def _makeup(graph: ChannelGraph) -> dict[Slot, tuple[tuple[str, int], ...]]:
    """(tensor, dim) that can be cut -> its groups, each with the number of positions there."""
    found: dict[Slot, list[tuple[str, int]]] = {}
    for name, group in graph.groups.items():
        for part in group.slices:
            found.setdefault((part.tensor, part.dim), []).append((name, len(part.positions)))
    return {slot: tuple(parts) for slot, parts in found.items()}


def _inside(module: str, slots: Iterable[Slot]) -> list[Slot]:
    return [slot for slot in slots if not module or slot[0].startswith(f"{module}.")]


def attributes_read(skeleton: Skeleton) -> tuple[list[Attribute], tuple[bool, ...]]:
    """The integers that the forward pass reads from attributes of its modules, and of plain objects that they hold.

    Args:
        skeleton: of no use afterwards.

    Returns:
        The attributes; and whether the network trains, for each mode in which its forward pass comes through.
    """
    names = {id(module): name for name, module in skeleton.model.named_modules()}
    reads: dict[tuple[str, str], Any] = {}

    def watched(kind: Any) -> type:
        def read(self: Any, attribute: str) -> Any:
            value = kind.__getattribute__(self, attribute)
            if attribute in kind.__getattribute__(self, "__dict__"):
                reads.setdefault((names[id(self)], attribute), value)
            return value

        return type(kind.__name__, (kind,), {"__getattribute__": read})

    kinds: dict[type, type] = {}
    for module in skeleton.model.modules():
        kind = type(module)
        # What follows by a function of its own needs no search, and what is compiled shows no reads.
        if kind not in SHAPE_UPDATES and not isinstance(module, torch.jit.ScriptModule):
            module.__class__ = kinds.setdefault(kind, watched(kind))
    modes = tuple(training for training in (False, True) if reached(skeleton, (training,)) == float("inf"))
    found = [_integers(module, name, value) for (module, name), value in reads.items()]
    return [attribute for some in found for attribute in some], modes


def _integers(module: str, name: str, value: Any) -> list[Attribute]:
    if is_size(value):
        return [Attribute(module, name)]
    if isinstance(value, (list, tuple)):
        return [Attribute(module, name, index) for index, item in enumerate(value) if is_size(item)]
    if "." not in name and is_plain(value):
        return [found for own, item in vars(value).items() for found in _integers(module, f"{name}.{own}", item)]
    return []


def reached(skeleton: Skeleton, modes: Iterable[bool]) -> float:
    """How many operators the forward passes call before they fail; infinite where none does.

    Args:
        modes: for each forward pass, whether the network trains.
    """
    counter = _Counter()
    try:
        with counter:
            for training in modes:
                skeleton.run(training=training)
    except Exception:  # noqa: BLE001  a forward pass on wrong shapes fails in any way
        return counter.count
    return float("inf")


class _Counter(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def search(kinds: Sequence[Kind], score: Callable[[frozenset[Kind]], float], enough: float, limit: int) -> set[Kind]:
    """The kinds that are needed to bring the score to `enough`, or as near as single steps and steps in pairs lead.

    Args:
        kinds: the likeliest first.
        score: of the forward pass with these attributes set; higher is better.
        limit: how often the score may be asked for.
    """
    known: dict[frozenset[Kind], float] = {}

    def rated(some: Iterable[Kind]) -> float:
        key = frozenset(some)
        if key not in known:
            known[key] = score(key) if len(known) < limit else float("-inf")
        return known[key]

    best = rated(())
    chosen: set[Kind] = set()
    likeliest: dict[Any, Kind] = {}
    for kind in kinds:
        if kind.ratio == 1:
            likeliest.setdefault(kind.target, kind)
    if rated(likeliest.values()) >= enough:
        chosen, best = set(likeliest.values()), enough
    while best < enough:
        taken = {kind.target for kind in chosen}
        free = [kind for kind in kinds if kind.target not in taken]
        step = _step(free, chosen, rated, best, enough)
        if not step:
            break
        chosen |= step
        best = rated(chosen)
    for kind in sorted(chosen, key=kinds.index, reverse=True):  # the least likely goes first
        if rated(chosen - {kind}) >= best:
            chosen -= {kind}
    return chosen


def _step(
    free: Sequence[Kind], chosen: set[Kind], rated: Callable[[Iterable[Kind]], float], best: float, enough: float
) -> set[Kind]:
    """The kind, or the pair, whose addition brings the score furthest; empty where none brings it on."""
    furthest: set[Kind] = set()
    for some in ([{kind} for kind in free], [{a, b} for a in free for b in free if a.target != b.target]):
        for more in some:
            value = rated(chosen | more)
            if value > best:
                furthest, best = more, value
            if best >= enough:
                return furthest
        if furthest:
            break
    return furthest
