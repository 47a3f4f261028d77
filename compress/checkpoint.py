"""Checkpoints: a network as `model.safetensors` plus `architecture.json`, without a pickle.

`architecture.json` names the factory of the dense model and the positions of its tensors that are kept. Loading builds
the dense model, cuts it by that list and reads the weights in: outputs are bit-identical to those of the saved model.
Reading a checkpoint runs no code but the factory's, and that only when its module is trusted (`compress.models.build`).
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from compress import models
from compress.attributes import Attribute, attributes_set, set_attributes
from compress.errors import InputError
from compress.files import make_directory, replacing, sha256, write_text
from compress.removal import Slot, dense_sizes, keep_slices, kept_slices

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"


class Kept(BaseModel):
    """Positions kept along dimensions of equal fate: the channels of one group keep one list in all their layers.

    Attributes:
        of: size of the dimensions in the dense model.
        indices: positions kept, ascending.
        slices: "TENSOR:DIM", parameter or buffer and its dimension.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: int = Field(ge=1)
    indices: tuple[int, ...] = Field(min_length=1)
    slices: tuple[str, ...] = Field(min_length=1)

    @field_validator("indices")
    @classmethod
    def _ascending(cls, indices: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise((-1, *indices))):
            raise ValueError("indices must be ascending")
        return indices


class Architecture(BaseModel):
    """What `architecture.json` holds.

    Attributes:
        format: version of the file format.
        factory: builds the dense model, see `compress.models.build`.
        kwargs: the factory's arguments.
        image_shape: (C, H, W) of one input image.
        classes: names in the order of the outputs; empty when unknown.
        mean, std: per channel, of the normalisation that the input has had; empty for none.
        resize: shorter side in pixels of an image before its centre is cut out; None where the whole image is resized.
        kept: what pruning left; empty for a dense model.
        attributes: "MODULE.NAME" or "MODULE.NAME[INDEX]" -> integer that the forward pass reads there, where pruning
            changed it.
        provenance: recipe, seeds, versions, accuracy: free, never read back.
        weights_sha256: of `model.safetensors`.
        sha256: of this file's canonical JSON without this field, so that a changed byte shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["espalier-checkpoint/1"] = "espalier-checkpoint/1"
    factory: str
    kwargs: dict[str, Any] = {}
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    kept: tuple[Kept, ...] = ()
    attributes: dict[str, Annotated[int, Field(ge=1, strict=True)]] = {}
    provenance: dict[str, Any] = {}
    weights_sha256: str
    sha256: str = ""

    @classmethod
    def read(cls, directory: str | Path) -> "Architecture":
        """Read and check `DIRECTORY/architecture.json`; the weights are not touched.

        Raises:
            InputError: the file is missing, unreadable or changed since it was written.
        """
        path = Path(directory) / ARCHITECTURE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"{directory} is no checkpoint: it holds no {ARCHITECTURE}.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from error
        try:
            architecture = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{path} is damaged: {where}: {first['msg']}; restore it or save it again.") from None
        if architecture.sha256 != architecture.own_digest():
            raise InputError(f"{path} was changed after it was written: its SHA-256 does not fit; restore it.")
        return architecture

    def own_digest(self) -> str:
        """SHA-256 of the canonical JSON of everything but `sha256`."""
        # Checkpoints from before `resize` and `attributes` have digests without them.
        left_out = {"sha256"}
        left_out |= {name for name, empty in (("resize", None), ("attributes", {})) if getattr(self, name) == empty}
        content = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    image_shape: Sequence[int],
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    resize: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, dense or pruned by `compress.Pruner`, as a checkpoint.

    Args:
        directory: created where missing; an earlier checkpoint in it is replaced.
        factory: builds the dense model again: "espalier:resnet20", "torchvision:resnet50", "package.module:function".
        kwargs: the factory's arguments, JSON values. `weights` is left out, for the checkpoint holds the weights.
        image_shape: (C, H, W) of one input image.
        classes, mean, std, resize, provenance: see `Architecture`.

    Raises:
        InputError: the directory cannot be written, or `kwargs` holds what JSON cannot.
    """
    path = Path(directory)
    make_directory(path)
    arguments = models.without_weights(factory, dict(kwargs or {}))
    try:
        json.dumps([arguments, dict(provenance or {})], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"The checkpoint {path} cannot hold its factory's arguments as JSON: {error}.") from error
    # Shared tensors are written once each: safetensors refuses views of one storage.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(path / WEIGHTS) as temporary:
        save_file(tensors, temporary)
        digest = sha256(temporary)
    by_fate: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    sizes = dense_sizes(model)
    for (tensor, dim), positions in kept_slices(model).items():
        by_fate.setdefault((sizes[tensor, dim], tuple(positions.tolist())), []).append(f"{tensor}:{dim}")
    architecture = Architecture(
        factory=factory,
        kwargs=arguments,
        image_shape=_triple(image_shape),
        classes=tuple(classes),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        resize=resize,
        kept=tuple(Kept(of=size, indices=indices, slices=tuple(slices)) for (size, indices), slices in by_fate.items()),
        attributes=attributes_set(model),
        provenance={"espalier": _own_version(), "torch": torch.__version__, **dict(provenance or {})},
        weights_sha256=digest,
    )
    signed = architecture.model_copy(update={"sha256": architecture.own_digest()})
    write_text(path / ARCHITECTURE, signed.model_dump_json(indent=1) + "\n")


def load(directory: str | Path, *, trust: Collection[str] = ()) -> nn.Module:
    """The saved network, in evaluation mode, on the CPU; it can be pruned further.

    Args:
        trust: modules beyond espalier, torchvision and timm that may be imported for the factory.

    Raises:
        InputError: a file is missing, damaged or changed, the factory is not trusted, or it builds another model.
    """
    path = Path(directory)
    architecture = Architecture.read(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{path} is no complete checkpoint: it holds no {WEIGHTS}.")
    if sha256(weights) != architecture.weights_sha256:
        raise InputError(f"{weights} was changed after it was written: its SHA-256 does not fit; restore it.")
    model = models.build(architecture.factory, trust=trust, **architecture.kwargs)
    keep, attributes = _kept(architecture, model, path), _attributes(architecture, model, path)
    keep_slices(model, keep)
    set_attributes(model, attributes)
    try:
        state = load_file(weights)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"The weights of {path} do not fit what {architecture.factory} builds: {str(error).splitlines()[0]} "
            "Install the library version that the checkpoint was made with (see its provenance)."
        ) from error
    return model.eval()


def _kept(architecture: Architecture, model: nn.Module, path: Path) -> dict[Slot, torch.Tensor]:
    shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    keep: dict[Slot, torch.Tensor] = {}
    for entry in architecture.kept:
        indices = torch.tensor(entry.indices, dtype=torch.int64)
        for text in entry.slices:
            tensor, _, dim = text.rpartition(":")
            shape = shapes.get(tensor, ())
            if (
                not dim.isdigit()
                or int(dim) >= len(shape)
                or shape[int(dim)] != entry.of
                or max(entry.indices) >= entry.of
            ):
                raise InputError(
                    f"{path / ARCHITECTURE} prunes {text} of size {entry.of}, but {architecture.factory} builds "
                    f"{tensor} of shape {tuple(shape) or 'none'}: install the version the checkpoint was made with."
                )
            keep[tensor, int(dim)] = indices
    return keep


def _attributes(architecture: Architecture, model: nn.Module, path: Path) -> dict[Attribute, int]:
    found: dict[Attribute, int] = {}
    for text, value in architecture.attributes.items():
        attribute = Attribute.parsed(model, text)
        dense = None if attribute is None else attribute.value(model)
        if attribute is None or dense is None or value > dense:
            raise InputError(
                f"{path / ARCHITECTURE} sets {text} to {value}, but {architecture.factory} builds "
                f"{'no such integer' if dense is None else f'{dense} there, and pruning makes sizes smaller'}: install "
                "the version the checkpoint was made with."
            )
        found[attribute] = value
    return found


def _triple(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(f"image_shape is {tuple(shape)}, but must be (channels, height, width) of one image.")
    channels, height, width = (int(size) for size in shape)
    return channels, height, width


def _own_version() -> str:
    try:
        return version("espalier")
    except PackageNotFoundError:
        return "not installed"
