"""What the processes of a group in PyTorch open; like `opening`, it imports beforehand what takes long."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.groups import Precision
from benchmarks.gpu_suite.opening import OpenNetwork, failed
from benchmarks.harness.processes import call
from benchmarks.harness.subject import Candidate, Subject
from compress import checkpoint
from deploy.runtimes import open_runtime


def open_checkpoint(
    *, artefact: str, precision: Precision, pool: str, batch_size: int, device: str, threads: int, runtime: str
) -> Subject:
    """A checkpoint, converted to the precision.

    Raises:
        HarnessError: as `open_file` does.
    """
    try:
        network = checkpoint.load(artefact)
        network = (network.half() if precision == "fp16" else network).to(device)
        opened = open_runtime(network, device=device, threads=threads, runtime=runtime)
    except Exception as error:
        raise failed(error) from error
    return OpenNetwork(opened, Path(pool), batch_size)


def warm_caches(candidates: Sequence[Candidate]) -> None:
    """Open every checkpoint once, all at the same time: what PyTorch's compiler then keeps on disk, it finds again.

    One that fails says so when it is measured.
    """

    def warm(candidate: Candidate) -> None:
        try:
            call(answer_once, candidate.arguments, what=f"Compiling {candidate.name!r}")
        except Exception:  # noqa: BLE001
            return

    with ThreadPoolExecutor(len(candidates)) as threads:
        list(threads.map(warm, candidates))


def answer_once(**arguments: Any) -> None:
    """Open a checkpoint, answer one query, close it."""
    subject = open_checkpoint(**arguments)
    subject.lane().query(0)
    subject.close()
