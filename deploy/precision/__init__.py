"""Number formats of the deployable files: the format lives in the ONNX file, so that every runtime obeys it."""

from typing import Final, Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["any", "cpu", "gpu"]
"""What a file was made for: the quantised ones differ by target, as the kernels want other types of activations."""

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16", "int8", "fp8")
HALF: Final[frozenset[Precision]] = frozenset({"fp16", "bf16"})
QUANTISED: Final[frozenset[Precision]] = frozenset({"int8", "fp8"})

TARGETS: Final[dict[Precision, tuple[Target, ...]]] = {
    "fp32": ("any",),
    "fp16": ("any",),
    "bf16": ("any",),
    "int8": ("cpu", "gpu"),
    "fp8": ("gpu",),
}
"""Targets that a file of each precision can be made for."""
