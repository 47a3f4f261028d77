"""What an ONNX file of ours says about itself: what a server must know to feed it, and what it was made for."""

import json
from collections.abc import Iterable
from typing import Any, Self

import onnx
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from compress.errors import InputError
from deploy.precision import Precision, Target

PREFIX = "espalier."
"""Our keys in `metadata_props` begin so: espalier.version and one more for each field of `Metadata`."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Quantisation(_Strict):
    """How an int8 or fp8 file came to its scales."""

    calibration: str
    """minmax, entropy or percentile"""
    data: str
    """Where the calibration images came from."""
    samples: NonNegativeInt
    """Images that the ranges of the activations were taken from."""
    excluded: tuple[str, ...] = ()
    """Layers that stayed in floating point because somebody or the search for accuracy asked for it."""


class Metadata(_Strict):
    """What an ONNX file of ours says about itself."""

    version: str
    """Espalier's version."""
    torch_version: str
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """(C, H, W)"""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]; empty if not known."""
    std: tuple[PositiveFloat, ...]
    resize: PositiveInt | None = None
    """Shorter side in pixels to which an image is brought before its centre is cut out; None: the whole image is
    brought to `image_shape`."""
    checkpoint_sha256: str
    """Digest of the checkpoint that was exported; empty if it was none."""
    precision: Precision = "fp32"
    target: Target = "any"
    quantisation: Quantisation | None = None
    other: dict[str, str]
    """The caller's own entries."""

    @model_validator(mode="after")
    def _normalisation_of_every_channel(self) -> Self:
        if {len(self.mean), len(self.std)} not in ({0}, {self.image_shape[0]}):
            raise ValueError(f"mean and std must have {self.image_shape[0]} values each, or none")
        return self


def write_metadata(model: onnx.ModelProto, about: Metadata) -> None:
    """Put the metadata into the file's header, in place of any that it had."""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, encode(about))


def encode(about: Metadata) -> dict[str, str]:
    """Each field as JSON under its own key, the caller's entries as they are.

    Raises:
        InputError: one of the caller's keys is reserved.
    """
    for key in about.other:
        if key.startswith(PREFIX):
            raise InputError(f'Metadata key "{key}" begins with "{PREFIX}", which is reserved; rename it.')
    own = about.model_dump(mode="json", exclude={"other"})
    return about.other | {PREFIX + key: json.dumps(value) for key, value in own.items()}


def decode(entries: Iterable[onnx.StringStringEntryProto], source: str) -> Metadata | None:
    """The metadata among a file's entries; None where another tool wrote the file and left none of ours.

    Raises:
        InputError: ours are incomplete or malformed; `source` names the file.
    """
    found = {item.key: item.value for item in entries}
    if not any(key.startswith(PREFIX) for key in found):
        return None
    fields: dict[str, Any] = {"other": {}}
    try:
        for key, value in found.items():
            if key.startswith(PREFIX):
                fields[key.removeprefix(PREFIX)] = json.loads(value)
            else:
                fields["other"][key] = value
        return Metadata.model_validate(fields)
    except (ValidationError, json.JSONDecodeError) as error:
        raise InputError(lacking(source)) from error


def lacking(source: str) -> str:
    """What is said of a file whose metadata are missing or malformed."""
    return (
        f"{source} lacks Espalier's description of the model ({PREFIX}image_shape and others); "
        "it was written or changed by another tool: export it again with espalier export."
    )
