"""What this machine can do at best: multiply-adds per second in a large matrix product, bytes per second in a copy.

Each is the fastest of several repetitions, sizes and libraries, since a peak is what the machine can do and everything
that disturbs a measurement only lowers it. It is still measured, not read off a data sheet: no limit in a result is one
that nobody ever reached here.

A peak belongs to one machine, device, type and number of threads, and is kept in `peaks.json` in the user's cache. One
of a CPU that had other work to do meanwhile is too low: it is measured once more when the machine is quieter, and the
faster figures of both stay.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.machine_files import field

if TYPE_CHECKING:
    import torch

    from benchmarks.harness.products import Product

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16", "int8", "float8")

SLICE_S = 0.1
"""Time for the repetitions of one product of one size."""

LONGEST_S = 0.25
"""A product that would take longer than this is not tried; nor are larger ones."""

COPY_S = 0.4

COPY_BYTES = 256 * 1024**2
"""Size of the array that is copied, at least; and at least 4 times the last-level cache."""

BUSY_SHARE = 0.5
"""Processes ready to run per CPU, above which a measurement is disturbed."""

VERSION = 1


class Peak(BaseModel):
    """The most that a machine did per second, in one type, on one device, with so many threads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dtype: str
    device: str
    threads: int = Field(ge=1, description="CPU threads; of no meaning on a GPU.")
    macs_per_s: float | None = Field(gt=0, description="None where no library multiplies in this type; `how` says why.")
    bytes_per_s: float = Field(gt=0, description="Bytes read plus bytes written by a copy.")
    how: str = Field(description="Which operations of which size were the fastest.")
    measured_at: AwareDatetime


class _Entry(BaseModel):
    """One peak in the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    machine: dict[str, Any]
    busy: bool
    peak: Peak


def measured_peak(dtype: str, *, device: str = "cpu", threads: int, refresh: bool = False) -> Peak:
    """The peak of this machine, from the cache if it was measured before, else measured now in at most 3 s.

    Args:
        dtype: one of `DTYPES`.
        device: "cpu", "cuda" or "cuda:N".
        refresh: measure again, whatever the cache holds.

    Raises:
        HarnessInputError: the type, the device or the number of threads cannot be used.
    """
    if dtype not in DTYPES:
        raise HarnessInputError(f"No peak is measured in {dtype}: choose one of {', '.join(DTYPES)}.")
    if threads < 1:
        raise HarnessInputError(f"{threads} threads multiply nothing: give at least 1.")
    import torch  # here, so that who only reads peaks can do without

    place = _place(device)
    machine = _machine(place, threads)
    busy = _busy(place)
    here = {entry.peak.dtype: entry for entry in _read(cache_file()) if entry.machine == machine}
    known = None if refresh else here.get(dtype)
    if known is not None and (busy or not known.busy):
        return known.peak
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # The pace of memory is the same for all types: measured once, so that limits of two types compare.
        other = next((entry for entry in here.values() if entry.peak.dtype != dtype and entry.busy <= busy), None)
        if other is not None and not refresh:
            bytes_per_s, copied = other.peak.bytes_per_s, other.peak.how.rpartition("; ")[2]
        else:
            bytes_per_s, copied = _copy(place)
        macs_per_s, multiplied = _product(dtype, place, threads)
    finally:
        torch.set_num_threads(before)
    if known is not None:
        multiplied_before, _, copied_before = known.peak.how.rpartition("; ")
        bytes_per_s, copied = max((bytes_per_s, copied), (known.peak.bytes_per_s, copied_before))
        if known.peak.macs_per_s is not None and known.peak.macs_per_s > (macs_per_s or 0):
            macs_per_s, multiplied = known.peak.macs_per_s, multiplied_before
    peak = Peak(
        dtype=dtype,
        device=str(place),
        threads=threads,
        macs_per_s=macs_per_s,
        bytes_per_s=bytes_per_s,
        how=f"{multiplied}; {copied}",
        measured_at=datetime.now(UTC),
    )
    _write(cache_file(), _Entry(machine=machine, busy=busy, peak=peak))
    return peak


def cache_file() -> Path:
    """Where peaks are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "espalier" / "peaks.json"


def _place(device: str) -> "torch.device":
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise HarnessInputError(f'There is no device "{device}"; give "cpu", "cuda" or "cuda:N".') from error
    if place.type == "cuda":
        if not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
            raise HarnessInputError(f"Device {device} has no peak here: PyTorch finds no such GPU; choose cpu.")
        return torch.device("cuda", place.index or 0)
    if place.type != "cpu":
        raise HarnessInputError(f"No peak is measured on {device}; choose cpu or cuda.")
    return place


def _machine(place: "torch.device", threads: int) -> dict[str, Any]:
    """Everything that makes it another machine."""
    import torch

    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        hardware: dict[str, Any] = {"gpu": properties.name, "uuid": str(getattr(properties, "uuid", ""))}
    else:
        hardware = {
            "cpu": field(Path("/proc/cpuinfo"), "model name", ":") or platform.processor(),
            "microcode": field(Path("/proc/cpuinfo"), "microcode", ":"),
            "affinity": len(os.sched_getaffinity(0)),
            "onnxruntime": _version("onnxruntime"),
        }
    return hardware | {"host": platform.node(), "device": str(place), "threads": threads, "torch": torch.__version__}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _product(dtype: str, place: "torch.device", threads: int) -> tuple[float | None, str]:
    """The fastest product of two square matrices, and which it was; None and why there is none."""
    from benchmarks.harness.products import products

    found: list[tuple[float, str]] = []
    refusals = []
    sizes = (256, 512, 1024, 2048) if place.type == "cpu" else (2048, 4096, 8192)
    for product in products(dtype, place, threads):
        try:
            found += _rates(product, sizes, place)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            refusals.append(f"{product.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if found:
        return max(found)
    return None, f"no product in {dtype} on {place} ({'; '.join(refusals).replace(';', ',') or 'no library has one'})"


def _rates(product: "Product", sizes: tuple[int, ...], place: "torch.device") -> Iterator[tuple[float, str]]:
    """Multiply-adds per second at each size that does not take too long."""
    last_s = 0.0
    for size in sizes:
        if 8 * last_s > LONGEST_S:
            return
        last_s = _best(product.make(size), SLICE_S, place)
        yield size**3 / last_s, f"{product.name} of {size} x {size}"


def _copy(place: "torch.device") -> tuple[float, str]:
    """Bytes read and written per second by a copy of an array far larger than the last-level cache."""
    import torch

    size = COPY_BYTES
    if place.type == "cpu":
        size = min(max(COPY_BYTES, 4 * last_level_cache()), psutil.virtual_memory().available // 8)
    else:
        size *= 4
    source = torch.ones(size // 4, device=place)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), COPY_S, place)
    return 2 * source.nbytes / seconds, f"copy of {source.nbytes / 1e6:.0f} MB"


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU, 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1], 1))
        except (OSError, ValueError):
            continue
    return max(sizes)


def _best(step: Callable[[], Any], seconds: float, place: "torch.device") -> float:
    """Seconds of the fastest of as many calls as fit into that time, one at the least, after one that warms up."""
    import torch

    synchronise = (lambda: torch.cuda.synchronize(place)) if place.type == "cuda" else (lambda: None)
    step()
    synchronise()
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        step()
        synchronise()
        best = min(best, time.perf_counter() - begin)
    return best


def _busy(place: "torch.device") -> bool:
    """Whether the CPU has other work to do, as far as its load of the last minute tells."""
    return place.type == "cpu" and os.getloadavg()[0] > BUSY_SHARE * len(os.sched_getaffinity(0))


def _read(path: Path) -> list[_Entry]:
    """What the cache holds; nothing where it is missing or damaged, for then all is measured anew."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [_Entry.model_validate(entry) for entry in document["peaks"]] if document["version"] == VERSION else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.info("The measured peaks in %s cannot be read (%s): measuring again.", path, type(error).__name__)
        return []


def _write(path: Path, entry: _Entry) -> None:
    """Add a peak to the cache in one atomic step; a cache that cannot be written is only logged."""
    key = entry.machine, entry.peak.dtype
    entries = [old for old in _read(path) if (old.machine, old.peak.dtype) != key] + [entry]
    document = {"version": VERSION, "peaks": [item.model_dump(mode="json") for item in entries]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        try:
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("The measured peak is not kept: cannot write %s (%s).", path, error.strerror)
