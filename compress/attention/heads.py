"""What the forward passes of pruned attention modules share: heads split off and joined, sizes read off a removal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import WorkError
from compress.removal import Cuts

ADVICE = "keep it out of pruning (protect), or register its class with compress.removal.shape_update"


def split_heads(x: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """(..., N, parts * H * D) -> `parts` tensors (..., H, N, D), of a projection with its rows ordered (part, H, D)."""
    return tuple(part.transpose(-3, -2) for part in x.unflatten(-1, (parts, heads, -1)).unbind(-3))


def join_heads(x: Tensor) -> Tensor:
    """(..., H, N, D) -> (..., N, H * D)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot product attention with `module.scale`, and the dropout of `module.attn_drop` where there is one.

    The scale is given, for the function's default is that of the width that is left, not of the width the network was
    trained with.

    Args:
        q, k, v: (..., H, N, D).
        bias: added to the scores, or True where a query may look; broadcast to (B, H, N, N).
    """
    drop = getattr(module, "attn_drop", None)
    rate = drop.p if module.training and drop is not None else 0.0
    if q.dim() > 4:  # the exporter to ONNX takes four dimensions
        inner = q.shape[1:-3]
        flat = attend(module, q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), bias, causal=causal)
        return flat.unflatten(0, (-1, *inner))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, is_causal=causal, scale=module.scale)


def left_over(module: nn.Module, cuts: Cuts, tensor: str, heads: int, parts: int = 1) -> tuple[list[int], list[int]]:
    """What a removal left of a projection whose rows are ordered (part, head, column).

    Args:
        tensor: its name inside `module`; its dimension 0 counts.
        heads: of the projection before the removal.

    Returns:
        The heads kept, and the columns kept of every head: columns of part 0, then, counted on, of part 1, ...

    Raises:
        WorkError: heads of unequal widths are left, or a part (q, k, v) of its own width.
    """
    slot = (tensor, 0)
    size = cuts.sizes[slot] if slot in cuts else module.get_parameter(tensor).shape[0]
    width, rest = divmod(size, parts * heads)
    if rest:
        raise WorkError(f"{tensor} of a {type(module).__name__} has {size} rows, not {parts * heads} blocks: {ADVICE}.")
    rows = cuts[slot].tolist() if slot in cuts else range(size)
    columns: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in range(parts)])
    for row in rows:
        part, within = divmod(row, heads * width)
        head, column = divmod(within, width)
        columns[head][part].append(part * width + column)
    first = next(iter(columns.values()))
    if any(kept != first for kept in columns.values()) or len(set(map(len, first))) > 1:
        raise WorkError(
            f"The rows left of {tensor} in a {type(module).__name__} are not the same columns of whole heads, which "
            f"its forward pass cannot use: {ADVICE}."
        )
    return sorted(columns), [column for part in first for column in part]


def same_heads(module: nn.Module, kept: Iterable[list[int]]) -> int:
    """The number of heads kept, the same heads by every projection of the module.

    Raises:
        WorkError: they are not the same.
    """
    first, *others = kept
    if any(other != first for other in others):
        raise WorkError(f"The projections of a {type(module).__name__} keep different heads: {ADVICE}.")
    return len(first)


def become(module: nn.Module, pruned: type[nn.Module]) -> None:
    """Give a live module the forward pass of `pruned`, whose last base is the class of the dense module.

    Raises:
        WorkError: the module is of a class derived from that one, whose forward pass may be another.
    """
    dense = pruned.__bases__[-1]
    if type(module) not in (dense, pruned):
        raise WorkError(
            f"{type(module).__qualname__} derives from {dense.__module__}.{dense.__qualname__} and may compute "
            f"otherwise: {ADVICE}."
        )
    module.__class__ = pruned


@dataclass(frozen=True)
class Row:
    """How modules of one class follow a removal.

    Attributes:
        projections: weight -> how many of q, k and v it stacks; its rows are ordered (q k v, head, column). Those that
            a module does not have are passed over.
        pruned: class that the module takes.
        heads, width, total: attributes that hold the number of heads, the width of a head in the first projection, and
            their product; None where the forward pass reads none.
        suffices: attributes alone make the forward pass of the dense class follow, as long as the width of the heads
            stays: its scale is then the default of `scaled_dot_product_attention`.
    """

    projections: Mapping[str, int]
    pruned: type[nn.Module] | None = None
    heads: str = "num_heads"
    width: str | None = None
    total: str | None = None
    suffices: bool = False

    def __call__(self, module: Any, cuts: Cuts) -> None:
        """Make `module` follow `cuts`."""
        held = {name for name, _ in module.named_parameters()}
        left = [
            (*left_over(module, cuts, tensor, getattr(module, self.heads), parts), tensor, parts)
            for tensor, parts in self.projections.items()
            if tensor in held
        ]
        if not left:
            raise WorkError(f"A {type(module).__name__} has none of {', '.join(self.projections)}: {ADVICE}.")
        heads = same_heads(module, [kept for kept, *_ in left])
        _, columns, tensor, parts = left[0]
        width = len(columns) // parts
        narrower = width < cuts.sizes.get((tensor, 0), 0) // (parts * getattr(module, self.heads))
        setattr(module, self.heads, heads)
        for attribute, value in ((self.width, width), (self.total, heads * width)):
            if attribute is not None:
                setattr(module, attribute, value)
        if self.pruned is not None and (narrower or not self.suffices):
            become(module, self.pruned)
        elif narrower and getattr(module, "fused_attn", False):
            module.fused_attn = False  # the plain product takes the scale from the module


Rows = Mapping[type[nn.Module], Callable[[Any, Cuts], None]]


def follow(rows: Rows, module: nn.Module, cuts: Cuts) -> None:
    """Let the row of the module's class, or of the nearest base that has one, make it follow."""
    next(rows[ancestor] for ancestor in type(module).__mro__ if ancestor in rows)(module, cuts)
