"""Watching a measurement: the machine's state for the record, and its progress for the user."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.harness.conditions import Watch
from benchmarks.harness.errors import HarnessInputError
from compress.progress import Bar

logger = logging.getLogger(__name__)


@contextmanager
def watched(device: str) -> Iterator[Watch]:
    """What notes clocks and disturbances; of GPUs only where one is used."""
    try:
        watch = Watch(_uuids(device))
    except HarnessInputError as error:  # a slice of a GPU may have a name that NVML does not list
        logger.warning("the GPU is not watched: %s", error)
        watch = Watch()
    try:
        yield watch
    finally:
        watch.close()


def shown_on(bar: Bar) -> Callable[[int, float], None]:
    """For `measure`: how many rounds are done."""

    def on_round(done: int, elapsed_s: float) -> None:
        bar.advance(f"{done} rounds in {elapsed_s:.0f} s")

    return on_round


def _uuids(device: str) -> list[str]:
    """The GPU that PyTorch calls `device`, by a name that NVML knows too: the two count differently."""
    if not device.startswith("cuda"):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    index = torch.device(device).index
    return [f"GPU-{torch.cuda.get_device_properties(index or 0).uuid}"]
