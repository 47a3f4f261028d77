"""What is timed together, in which order, and how much time each group gets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["checkpoint", "onnx", "plan"]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Mode:
    """A runtime with its options."""

    name: str
    """As in the table of what was verified."""
    runtime: str
    """As `deploy.runtimes.open_runtime` takes it."""
    opens: Kind
    least_s: float
    """Time below which a group is not begun, as guessed before one has run: starting its processes and a few rounds."""
    label: str = ""
    """Added to the names of variants, where the runtime's own name is that of several modes."""
    warms: bool = False
    """Whether its compiler takes long and keeps on disk what it made, so that all networks are opened once before."""


EAGER = Mode("PyTorch: eager", "pytorch", "checkpoint", 15)
GRAPH = Mode("PyTorch: CUDA graphs", "pytorch:cuda_graph=true", "checkpoint", 15, "CUDA graph")
CHANNELS_LAST = Mode(
    "PyTorch: channels last, CUDA graphs",
    "pytorch:cuda_graph=true:channels_last=true",
    "checkpoint",
    15,
    "CUDA graph, channels last",
)
COMPILED = Mode("PyTorch: torch.compile", "pytorch:compile=true", "checkpoint", 60, "compiled", warms=True)
ONNXRUNTIME = Mode("ONNX Runtime: CUDA provider", "onnxruntime", "onnx", 20)
TENSORRT = Mode("TensorRT", "tensorrt", "plan", 100)


@dataclass(frozen=True)
class Tier:
    """Groups of like importance, by batch size first, then by precision, then by mode."""

    modes: tuple[Mode, ...]
    precisions: tuple[Precision, ...]


TIERS = (
    Tier((ONNXRUNTIME, GRAPH, EAGER), ("fp16", "fp32")),
    Tier((TENSORRT,), ("fp16",)),
    Tier((TENSORRT,), ("fp32",)),
    Tier((CHANNELS_LAST,), ("fp16",)),
    Tier((COMPILED,), ("fp16",)),
    Tier((COMPILED,), ("fp32",)),
)
BATCH_SIZES = (8, 1, 32)


@dataclass(frozen=True)
class Group:
    """All networks in one mode, precision and batch size, measured in the same rounds."""

    mode: Mode
    precision: Precision
    batch_size: int

    def __str__(self) -> str:
        return f"{self.mode.name}, {self.precision}, batch {self.batch_size}"


def groups(tiers: Sequence[Tier], batch_sizes: Sequence[int]) -> list[Group]:
    """All groups, the most important first."""
    return [
        Group(mode, precision, batch_size)
        for tier in tiers
        for batch_size in batch_sizes
        for precision in tier.precisions
        for mode in tier.modes
    ]


def shares(waiting: Sequence[Group], left_s: float, least_s: Callable[[Group], float]) -> dict[Group, float]:
    """Seconds for each group that fits into the time that is left.

    In their order, each group whose least time still fits gets that; what then remains is divided equally among them.
    A group without a share does not fit.
    """
    chosen: dict[Group, float] = {}
    free_s = left_s
    for group in waiting:
        least = least_s(group)
        if least <= free_s:
            chosen[group] = least
            free_s -= least
    return {group: least + free_s / len(chosen) for group, least in chosen.items()}
