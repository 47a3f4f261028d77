"""What a user asks of the builder of TensorRT engines: its settings and a range of batch sizes."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from compress.errors import InputError

UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]


class BuilderSettings(BaseModel):
    """How TensorRT builds; recorded in the manifest beside the engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workspace_bytes: PositiveInt | None = None
    """Most GPU memory that one layer may use for intermediate results; None: all that the GPU has."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """0 builds fastest, 5 searches longest for fast kernels."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products may round their inputs to 10 bits of mantissa."""
    version_compatible: bool = False
    """Whether later versions of TensorRT can run the engine; costs some speed."""
    hardware_compatible: HardwareCompatibility = "none"
    """Which other GPUs can run the engine; anything but "none" costs some speed."""
    refittable: bool = False
    """Whether the weights can be replaced without building again."""
    timing_cache: Path | None = None
    """File of kernel timings that is read before the build, where it exists, and written after it."""


def read_builder_settings(*, workspace: str | None, **settings: Any) -> BuilderSettings:
    """Settings as the command line gives them: `workspace` as text, such as "512MiB", the others by name.

    Raises:
        InputError: one of them is malformed or out of range.
    """
    try:
        return BuilderSettings(workspace_bytes=None if workspace is None else _read_size(workspace), **settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise InputError(f"--{name} cannot be {first['input']!r}: {first['msg']}; correct it.") from error


def _read_size(text: str) -> int:
    found = re.fullmatch(r"([1-9]\d{0,14}) ?([KMG]iB|)", text.strip(), re.ASCII)
    if found is None:
        raise InputError(f'--workspace "{text}" is no size; give bytes, or a number with KiB, MiB or GiB, as in 4GiB.')
    return int(found[1]) * UNITS[found[2]]


class BatchRange(BaseModel):
    """Batch sizes that an engine takes, from `minimum` to `maximum`, and the one that it is tuned for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: PositiveInt
    optimum: PositiveInt
    maximum: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"The batch range {self} is not in ascending order; give min:opt:max, as in 1:8:32.")
        return self

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "min:opt:max", as in "1:8:32".

        Raises:
            InputError: it is something else, or not in ascending order.
        """
        found = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8}):([1-9]\d{0,8})", text.strip(), re.ASCII)
        if found is None:
            raise InputError(
                f'"{text}" is no range of batch sizes: give the smallest, the usual and the largest, as in 1:8:32.'
            )
        minimum, optimum, maximum = map(int, found.groups())
        return cls(minimum=minimum, optimum=optimum, maximum=maximum)
