"""torch.compile without its ways back to eager mode, and with a count of what it compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.errors import WorkError, first_line

MOST_SHAPES = 256
"""Shapes that one forward may be compiled for; PyTorch's own 8 is for networks whose shapes were not meant to vary."""


class Compiled:
    """A module compiled by Inductor, for each shape anew.

    Left to itself, torch.compile runs in eager mode what it cannot trace, what fails to compile where errors are
    suppressed, and whatever comes after too many shapes. Here each of these is an error.

    Attributes:
        forward: the compiled module; call `prepare` once before for each shape.
        graphs: how many were compiled so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graphs = 0
        self._name = type(model).__name__
        self._inductor = torch._dynamo.lookup_backend("inductor")
        self.forward: Callable[[torch.Tensor], Any] = torch.compile(
            model, backend=self._backend, fullgraph=True, dynamic=False
        )
        self._shapes: set[tuple[int, ...]] = set()

    def prepare(self, images: torch.Tensor) -> None:
        """Compile for images of this shape, by running them, unless that was done.

        Raises:
            WorkError: the module cannot be compiled for them; says why.
        """
        shape = tuple(images.shape)
        if shape in self._shapes:
            return
        if torch._dynamo.config.disable:
            raise self._switched_off()
        before = self.graphs
        try:
            with (
                torch.inference_mode(),
                torch._dynamo.config.patch(suppress_errors=False, recompile_limit=MOST_SHAPES),
            ):
                self.forward(images)
        except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise WorkError(
                f"torch.compile failed on {self._name} for images of shape {shape}: {first_line(_cause(error))}; "
                "leave out compile=true."
            ) from error
        if self.graphs == before:
            raise self._switched_off()
        self._shapes.add(shape)

    def _switched_off(self) -> WorkError:
        return WorkError(
            f"torch.compile compiled nothing of {self._name}, because it is switched off "
            "(TORCH_COMPILE_DISABLE or torch._dynamo.config.disable); switch it on, or leave out compile=true."
        )

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled = self._inductor(graph, inputs)
        self.graphs += 1
        return compiled


def _cause(error: BaseException) -> BaseException:
    """What the compiler raised; Dynamo wraps it in an error whose first line says only which backend it was."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return error
