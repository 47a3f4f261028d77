"""Inferences of ONNX Runtime that are profiled node by node."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import WorkError
from deploy.runtimes.ort_errors import failures, reason


class Profiling:
    """Inferences on one batch, profiled."""

    def __init__(self, session: Any, batch: Mapping[str, np.ndarray], values: dict[str, Any], file: str) -> None:
        self._session = session
        self._batch = batch  # the values point into it
        self._values = values
        self._file = file

    def run(self) -> None:
        """One inference.

        Raises:
            WorkError: ONNX Runtime failed.
        """
        try:
            self._session.run_with_ort_values(None, self._values)
        except failures() as error:
            raise WorkError(f"ONNX Runtime failed on {self._file}: {reason(error)}.") from error

    def end(self) -> Path:
        """The profile of all inferences, in the format of Chrome's tracing."""
        return Path(self._session.end_profiling())
