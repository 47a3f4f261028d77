"""What goes into a network and what comes out of it: names, types, shapes."""

from dataclasses import dataclass

from pydantic import ConfigDict


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its NumPy dtype by name, and its shape.

    A dimension is a number where it is fixed, a name (`"batch"`) where it is dynamic, None where unknown.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} ({sizes})"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits: same rank, same fixed sizes, nothing empty."""
        return len(shape) == len(self.shape) and all(
            size == wanted if isinstance(wanted, int) else size > 0
            for size, wanted in zip(shape, self.shape, strict=True)
        )
