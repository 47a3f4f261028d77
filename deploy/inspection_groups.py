"""What of a network can be pruned: its channel groups, what stays and why, as JSON values.

`deploy.inspection_groups_views` shows them on a terminal.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from compress import checkpoint, models
from compress.budget import cost_model
from compress.errors import InputError
from compress.graph import ChannelGraph, Group, trace
from compress.graph.part import trace_part
from deploy.recipe import BudgetSection, PruneSection
from deploy.recipe_text import read_recipe
from deploy.run_directory import RunDirectory

SIZES: Final = {"espalier": (3, 32, 32)}
"""Images of factories whose networks say nothing of their input; others take 3 x 224 x 224."""

_EMBEDDING, _HEADS = "--embedding", "--attention heads"

HINTS: Final = (
    (r"changes the statistics of the others", _EMBEDDING),
    (r"over channels depends on their number", _EMBEDDING),
    (r"normalised over the channels that it reads", _EMBEDDING),
    (r"attention: .* which is kept", _HEADS),
    (r"operator .* has no rule", "a rule for the operator (docs/graph.md)"),
    (r"does not follow", "shape_update for the module (docs/graph.md)"),
)
"""Reason for which channels stay -> what may free them."""


def inspect_groups(
    target: str, *, shape: str | None = None, trust: Collection[str] = (), options: Mapping[str, Any]
) -> dict[str, Any]:
    """Trace a network and describe its channel groups.

    Args:
        target: checkpoint directory, run directory (its dense network, with its recipe's options), or model factory.
        shape: sizes of an image, "C,H,W"; by default those of the checkpoint, of timm's model, or 3,224,224.
        trust: modules that `package.module:function` may import.
        options: settings of the recipe's section `prune` that differ from the default, or from the run's recipe.

    Raises:
        InputError: the target is none of these or cannot be traced, or an option names what is not there.
    """
    settings = PruneSection(budget=BudgetSection(macs=1.0, parameters=None, channels=None))
    path = Path(target)
    if path.is_file():
        raise InputError(
            f"{target} is a file, of which channel groups cannot be found: give its checkpoint directory, a run "
            "directory or a model factory."
        )
    if (path / RunDirectory(path).recipe.name).exists():
        directory = RunDirectory(path)
        settings = read_recipe(directory.recipe).prune
        path = directory.baseline
        if not path.is_dir():
            raise InputError(f"{target} holds no network yet: let the run finish its baseline, or give a factory.")
    if path.is_dir():
        model = checkpoint.load(path, trust=trust)
        own_shape: tuple[int, ...] = checkpoint.Architecture.read(path).image_shape
    elif ":" in target:
        model = models.build(target, trust=trust)
        own_shape = _input_size(model) or SIZES.get(target.partition(":")[0], (3, 224, 224))
    else:
        raise InputError(
            f"{target} does not exist: give a checkpoint directory, a run directory, or a model factory such as "
            "torchvision:resnet50."
        )
    image_shape = own_shape if shape is None else _read_shape(shape)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    settings = settings.model_copy(update=given)
    try:
        graph = _traced(model, torch.zeros(2, *image_shape), settings)
    except InputError as error:
        of_options = error.__cause__ is None  # not of the forward pass
        if of_options or settings.part is not None or not hasattr(model, "backbone"):
            raise
        raise InputError(f"{error} Its backbone can be traced alone: --part backbone.") from error
    return {"kind": "groups", "target": target, "image_shape": list(image_shape)} | described(model, graph, settings)


def described(model: nn.Module, graph: ChannelGraph, settings: PruneSection) -> dict[str, Any]:
    """The channel groups of `model`, and what stays, as JSON values.

    MACs are those of one image; at the narrowest every group has the fewest channels that the settings allow.
    """
    macs = cost_model("macs", model, graph)
    narrowest = {name: _narrowest(group, settings) for name, group in graph.groups.items()}
    in_attention = frozenset(name for product in graph.products for name in product.groups)
    reasons: dict[str, dict[str, None]] = {}
    for frozen in graph.frozen:
        reasons.setdefault(frozen.reason, {}).update(dict.fromkeys(frozen.layers))
    return {
        "part": settings.part,
        "options": settings.model_dump(mode="json", include={"attention", "embedding", "ignore", "protect", "tie"}),
        "round_to": settings.round_to,
        "groups": [
            {
                "name": name,
                "goes": _goes(group, graph, attention=settings.attention if name in in_attention else None),
                "width": group.width,
                "step": group.step(settings.round_to),
                "narrowest": narrowest[name],
                "producers": [
                    {"layer": producer.layer, "rows": rows, "norms": list(producer.norms)}
                    for producer, rows in zip(group.producers, group.copies, strict=False)
                ],
                "consumers": list(group.consumers),
                "exact": group.exact,
                "residue": group.residue,
                "mixed": group.mixed,
            }
            for name, group in graph.groups.items()
        ],
        "stays": [
            {"reason": reason, "layers": list(layers), "hint": _hint(reason, settings)}
            for reason, layers in reasons.items()
        ],
        "operators_without_rule": graph.operators_without_rule,
        "attributes": [
            {
                "attribute": str(rule.attribute),
                "tensor": rule.follows[0],
                "dim": rule.follows[1],
                "ratio": str(rule.ratio),
            }
            for rule in graph.attributes
        ],
        "channels": {"removable": graph.removable, "all": _all_channels(model, graph)},
        "macs": {"now": macs.cost(graph.widths), "narrowest": macs.cost(narrowest)},
    }


def _traced(model: nn.Module, images: torch.Tensor, settings: PruneSection) -> ChannelGraph:
    if settings.graph == "torch-pruning":
        # Imported where it is used: it loads Torch-Pruning.
        from compress.graph import second_opinion

        return second_opinion.trace(model, images, ignore=settings.ignore)
    options: dict[str, Any] = settings.model_dump(include={"ignore", "protect", "tie", "attention", "embedding"})
    if settings.part is not None:
        return trace_part(model, settings.part, images, **options)
    return trace(model, images, **options)


def _goes(group: Group, graph: ChannelGraph, *, attention: str | None) -> str:
    """What one channel of the group is: of an attention layer a head, or a channel of every head."""
    if max(group.copies, default=1) == 1:
        return "channels"
    if attention == "widths":
        return "head channels"
    if attention == "heads" and _in_blocks(group):
        return "heads"
    layers = {part.tensor.rpartition(".")[0] for part in group.slices}
    return "grouped channels" if layers & graph.grouped else "channels"


def _in_blocks(group: Group) -> bool:
    """Whether neighbouring rows of a producer go together, as those of a head do."""
    for part in group.slices:
        if (part.tensor, part.dim) in group.filters:
            owner = dict(zip(part.positions.tolist(), part.channels.tolist(), strict=True))
            if any(owner.get(position + 1) == channel for position, channel in owner.items()):
                return True
    return False


def _narrowest(group: Group, settings: PruneSection) -> int:
    return min(group.width, group.narrowest(settings.round_to, settings.min_channels))


def _hint(reason: str, settings: PruneSection) -> str | None:
    hint = next((hint for pattern, hint in HINTS if re.search(pattern, reason)), None)
    return None if hint == _EMBEDDING and settings.embedding else hint


def _all_channels(model: nn.Module, graph: ChannelGraph) -> int:
    """Output channels of all layers that make any, removable or not."""
    filters = {slot for group in graph.groups.values() for slot in group.filters}
    made = {producer.layer for group in graph.groups.values() for producer in group.producers}
    stay = {layer for frozen in graph.frozen for layer in frozen.layers} - made
    return sum(graph.sizes[slot] for slot in filters) + sum(_width(model, layer) for layer in stay)


def _width(model: nn.Module, layer: str) -> int:
    """Output channels of a layer, or of a parameter that is used bare."""
    holder, _, last = layer.rpartition(".")
    thing: Any = getattr(model.get_submodule(holder), last)
    if isinstance(thing, nn.Module):
        width = getattr(thing, "out_channels", getattr(thing, "out_features", None))
        thing = next(thing.parameters()) if width is None else width
    return thing if isinstance(thing, int) else len(thing)


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) that a network of timm was made for."""
    about = getattr(model, "pretrained_cfg", None)
    size = about.get("input_size") if isinstance(about, Mapping) else None
    return None if size is None else tuple(size)


def _read_shape(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--shape is {text!r}, but has the form 3,224,224: channels, height and width of an image.")
    return tuple(map(int, parts))
