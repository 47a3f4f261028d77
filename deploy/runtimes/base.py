"""What every runtime looks like from outside, and the checks that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from compress.errors import InputError
from deploy.tensor_spec import TensorSpec


class Step(ABC):
    """One inference on a batch that is already in place; calling it returns when the outputs are complete."""

    @abstractmethod
    def __call__(self) -> None: ...

    @abstractmethod
    def outputs(self) -> dict[str, np.ndarray]:
        """What the latest call computed; valid until the next one."""


class Runtime(ABC):
    """Executes one network on one device.

    Subclasses set `inputs` and `outputs` and implement `_run`, `_bind` and `description`; what reaches `_run`
    and `_bind` has been checked here against the input specs and is contiguous.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    largest_batch: int | None = None
    """Most images that one inference takes; None for any number."""
    _closed = False

    def run(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference: arrays by input name in, arrays by output name out.

        Raises:
            InputError: a name, dtype or shape differs from the input specs.
            WorkError: the runtime failed.
        """
        return self._run(self._checked(batch))

    def bind(self, batch: Mapping[str, np.ndarray]) -> Step:
        """Put a batch in place and return the step that infers on it: timing without copies and allocation.

        The step may read the given arrays themselves, so leave them alone while it is in use.

        Raises:
            InputError: a name, dtype or shape differs from the input specs.
            WorkError: the runtime failed.
        """
        return self._bind(self._checked(batch))

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What ran, ready for JSON: runtime, version, device, threads, and where the library can tell, which
        provider executed how many kernels."""

    @abstractmethod
    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    @abstractmethod
    def _bind(self, batch: dict[str, np.ndarray]) -> Step: ...

    def close(self) -> None:
        """Release what the runtime holds; it cannot run afterwards."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._closed:
            raise InputError("The runtime has been closed; open the artefact again.")
        expected = "; ".join(str(spec) for spec in self.inputs)
        if set(batch) != {spec.name for spec in self.inputs}:
            given = ", ".join(sorted(batch)) or "nothing"
            raise InputError(f"The inputs given are {given}, but the network takes {expected}; name them so.")
        for spec in self.inputs:
            array = batch[spec.name]
            if not isinstance(array, np.ndarray):
                raise InputError(
                    f"Input {spec.name} is a {type(array).__name__}, but a NumPy array is needed "
                    f"({expected}); convert it."
                )
            if array.dtype != np.dtype(spec.dtype):
                raise InputError(
                    f"Input {spec.name} has dtype {array.dtype}, but the network takes {spec.dtype}; "
                    f'convert it with .astype("{spec.dtype}").'
                )
            if not spec.accepts(array.shape):
                raise InputError(
                    f"Input {spec.name} has shape {array.shape}, but the network takes {expected}; "
                    "give it a batch of that shape."
                )
        return {spec.name: np.ascontiguousarray(batch[spec.name]) for spec in self.inputs}
