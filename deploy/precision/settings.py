"""Which files are written for a network, and how they are quantised."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import InputError
from deploy.precision import PRECISIONS, QUANTISED, Precision, Target

Calibration = Literal["minmax", "entropy", "percentile"]


class ExportSettings(BaseModel):
    """The deployable files of a network."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    precision: tuple[Precision, ...] = Field(
        ("fp32",), min_length=1, description="number formats to write: fp32, fp16, bf16, int8, fp8"
    )
    fp32_io: bool = Field(False, description="whether fp16 and bf16 files take and give fp32")
    calibration: Calibration = Field("minmax", description="how int8 and fp8 ranges come from activations")
    samples: int = Field(256, ge=1, description="training images that ranges are taken from")
    exclude: tuple[str, ...] = Field((), description="layers that stay in floating point, by name or pattern")
    max_drop: float | None = Field(
        None,
        ge=0,
        description="points of top-1 that int8 and fp8 may lose; layers that harm most stay in floating point",
    )

    @field_validator("precision")
    @classmethod
    def _distinct(cls, precision: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if len(set(precision)) < len(precision):
            raise ValueError(f"{', '.join(precision)} names one precision twice; name each once")
        return precision


def read_settings(*, precision: Sequence[str], calibration: str, **others: Any) -> ExportSettings:
    """The settings that the options of `espalier export` give.

    Raises:
        InputError: a precision or a method does not exist, or a precision is named twice.
    """
    for name in precision or [""]:
        if name not in PRECISIONS:
            raise InputError(f"--precision names {name!r}, but must be of {', '.join(PRECISIONS)}.")
    if len(set(precision)) < len(precision):
        raise InputError(f"--precision names {', '.join(precision)}: name each once.")
    drop = others.get("max_drop")
    if drop is not None and not (math.isfinite(drop) and drop >= 0):
        raise InputError(f"--max-drop is {drop}, but must be a number of points, at least 0.")
    if drop is not None and not QUANTISED & set(precision):
        raise InputError("--max-drop is for int8 and fp8, and --precision names neither: leave it out.")
    if others.get("exclude") and set(precision) == {"fp32"}:
        raise InputError("--exclude keeps layers in fp32, and --precision names nothing else: leave it out.")
    if calibration not in get_args(Calibration):
        raise InputError(f"--method is {calibration!r}, but must be one of {', '.join(get_args(Calibration))}.")
    return ExportSettings(precision=tuple(precision), calibration=calibration, **others)


def read_targets(names: Sequence[str]) -> set[Target]:
    """The targets that `espalier export --target` gives.

    Raises:
        InputError: there is none, or it is none of cpu and gpu.
    """
    found: set[Target] = set()
    for name in names or [""]:
        if name != "cpu" and name != "gpu":
            raise InputError(f"--target names {name!r}, but must be cpu, gpu or both with a comma between.")
        found.add(name)  # type: ignore[arg-type]
    return found
