"""The inputs of a measurement: many different samples, so that a query rarely finds its input in a cache, on disk once
for all processes that time something on them.

    pool.json      how many samples, and the dtype of each input
    0.npy, 1.npy   the inputs in the order in which networks take them, samples along the first axis
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.errors import InputError
from compress.files import failed_write, make_directory, write_text
from deploy.tensor_spec import TensorSpec

INDEX: Final = "pool.json"

MOST_BATCHES: Final = 16_384
MOST_BYTES: Final = 512 * 1024**2
UNKNOWN_CACHE_BYTES: Final = 32 * 1024**2
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")

FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGERS_BELOW: Final = 10


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int
    dtypes: tuple[str, ...]


def pool_images(batch_size: int, image_bytes: int, last_level_cache_bytes: int) -> int:
    """How many samples a pool should have: whole batches, in all at least twice the last-level cache.

    No more than `MOST_BATCHES` batches and `MOST_BYTES`, but at least one batch.

    Args:
        image_bytes: of all inputs of one sample together.
    """
    batch_bytes = max(1, batch_size * image_bytes)
    batches = min(math.ceil(2 * last_level_cache_bytes / batch_bytes), MOST_BATCHES, MOST_BYTES // batch_bytes)
    return max(1, batches) * batch_size


def last_level_cache_bytes() -> int:
    """Of the first CPU, as Linux tells it; 32 MiB where it does not."""
    found = []
    for cache in CACHES.glob("index*"):
        try:
            level, size = ((cache / name).read_text().strip() for name in ("level", "size"))
            found.append((int(level), _bytes(size)))
        except (OSError, ValueError):
            continue
    return max(found)[1] if found else UNKNOWN_CACHE_BYTES


def random_inputs(
    specs: Sequence[TensorSpec], count: int, seed: int, *, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[np.ndarray]:
    """`count` samples for each input: floating-point numbers standard normal, integers from 0 to 9, booleans at random.

    Standard normal is what normalised images look like to arithmetic; zeros would let a CPU or a GPU draw less power.

    Args:
        shapes: input -> its sizes without the first axis, where the network leaves some of them open.

    Raises:
        InputError: a size is not known, a shape given does not fit, an input is of another type, or the samples do not
            fit into memory.
    """
    given = dict(shapes or {})
    if unknown := sorted(given.keys() - {spec.name for spec in specs}):
        raise InputError(
            f"A shape was given for {', '.join(unknown)}, but the network takes {'; '.join(map(str, specs))}; "
            "name one of these."
        )
    generator = np.random.default_rng(seed)
    arrays = []
    for spec in specs:
        shape = (count, *_sizes(spec, given.get(spec.name)))
        try:
            arrays.append(_random(spec, shape, generator))
        except MemoryError as error:
            raise InputError(f"{count} samples of {spec} do not fit into memory; give a smaller batch.") from error
    return arrays


def write_pool(directory: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write the inputs in the order in which networks take them.

    Raises:
        InputError: the directory cannot be written, or the arrays do not have the same number of samples.
        WorkError: the disk is full.
    """
    counts = {len(array) if array.ndim else 0 for array in arrays}
    if len(counts) != 1 or 0 in counts:
        given = ", ".join(str(array.shape) for array in arrays) or "none"
        raise InputError(
            f"The inputs of a pool have the shapes {given}; give arrays of the same number of samples along the first "
            "axis, at least one."
        )
    make_directory(directory)
    for position, array in enumerate(arrays):
        path = directory / _file(position)
        try:
            np.save(path, _storable(np.ascontiguousarray(array)), allow_pickle=False)
        except OSError as error:
            raise failed_write(path, error) from error
    index = _Index(samples=counts.pop(), dtypes=tuple(array.dtype.name for array in arrays))
    write_text(directory / INDEX, index.model_dump_json())  # last: without it there is no pool


def read_pool(directory: Path, specs: Sequence[TensorSpec], batch_size: int) -> list[dict[str, np.ndarray]]:
    """The pool as batches for a network that takes these inputs; they correspond by position.

    Floating-point numbers are cast to the dtype of the spec; else the batches are views. A rest that fills no batch is
    left out.

    Raises:
        InputError: the pool cannot be read, holds less than a batch, or does not fit the network.
    """
    arrays = read_arrays(directory)
    if len(arrays) != len(specs):
        raise InputError(
            f"The pool {directory} holds {len(arrays)} inputs, but the network takes {len(specs)} "
            f"({'; '.join(map(str, specs))}); give one for each."
        )
    fitting = [_cast(array, spec, position) for position, (array, spec) in enumerate(zip(arrays, specs, strict=True))]
    for position, (array, spec) in enumerate(zip(fitting, specs, strict=True)):
        shape = (batch_size, *array.shape[1:])
        if not spec.accepts(shape):
            raise InputError(
                f"Input {position} of the pool is a batch of shape {shape}, but the network takes {spec}; "
                "give inputs and a batch size that fit."
            )
    names = [spec.name for spec in specs]
    return [dict(zip(names, batch, strict=True)) for batch in batches_of(fitting, batch_size, directory)]


def read_arrays(directory: Path) -> list[np.ndarray]:
    """The inputs as they were written.

    Raises:
        InputError: they cannot be read, or are not what the pool's index says.
    """
    directory = Path(directory)
    try:
        index = _Index.model_validate_json((directory / INDEX).read_text(encoding="utf-8"))
        arrays = [
            _stored(np.load(directory / _file(position), allow_pickle=False), dtype)
            for position, dtype in enumerate(index.dtypes)
        ]
    except OSError as error:
        raise InputError(f"Cannot read the pool {directory}: {error.strerror}; write it first.") from error
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"The pool {directory} is damaged, or no pool at all; write it again.") from error
    if any(array.ndim == 0 or len(array) != index.samples for array in arrays):
        raise InputError(f"The pool {directory} does not hold {index.samples} samples of each input; write it again.")
    return arrays


def batches_of(arrays: Sequence[np.ndarray], batch_size: int, directory: Path) -> list[tuple[np.ndarray, ...]]:
    """Whole batches, as views; each holds all inputs in their order.

    Raises:
        InputError: there is not one.
    """
    samples = min(len(array) for array in arrays)
    if batch_size < 1 or samples < batch_size:
        raise InputError(
            f"A batch of {batch_size} was asked for, but the pool {directory} holds {samples} samples; "
            "give a batch size from 1 to that number, or write a larger pool."
        )
    starts = range(0, samples - batch_size + 1, batch_size)
    return [tuple(array[start : start + batch_size] for array in arrays) for start in starts]


def _file(position: int) -> str:
    return f"{position}.npy"


def _storable(array: np.ndarray) -> np.ndarray:
    """NumPy's files know no dtypes of other libraries, and give them back as bytes of no meaning."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    found = array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array
    if found.dtype.name != dtype:
        raise ValueError(f"{found.dtype.name} instead of {dtype}")
    return found


def _cast(array: np.ndarray, spec: TensorSpec, position: int) -> np.ndarray:
    if array.dtype == np.dtype(spec.dtype):
        return array
    if not {array.dtype.name, spec.dtype} <= FLOATS:
        raise InputError(
            f"Input {position} of the pool has dtype {array.dtype}, but the network takes {spec}; "
            f"give it as {spec.dtype}."
        )
    return array.astype(spec.dtype)


def _sizes(spec: TensorSpec, given: Sequence[int] | None) -> tuple[int, ...]:
    """Without the first axis."""
    wanted = spec.shape[1:]
    if not spec.shape:
        raise InputError(f"The input {spec} has no axis for samples, so there is nothing to batch; export it with one.")
    if given is not None:
        sizes = tuple(given)
        if not TensorSpec(spec.name, spec.dtype, wanted).accepts(sizes):
            raise InputError(
                f"The shape {', '.join(map(str, sizes))} was given for the input {spec}, which it does not fit; give "
                "its sizes without the first axis."
            )
        return sizes
    known = tuple(size for size in wanted if isinstance(size, int))
    if len(known) < len(wanted):
        raise InputError(
            f"The input {spec} has sizes that the network leaves open; give them, without the first axis, with "
            f"--shape {spec.name}={','.join(str(size) if isinstance(size, int) else '224' for size in wanted)}."
        )
    return known


def _random(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if spec.dtype in FLOATS:
        return generator.standard_normal(shape, np.float32)
    if spec.dtype == "bool":
        return generator.integers(0, 2, shape, np.int8).astype(np.bool_)
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        return generator.integers(0, INTEGERS_BELOW, shape, np.dtype(spec.dtype).type)
    raise InputError(f"The input {spec} is of a type for which no inputs are drawn; give some of your own.")


def _bytes(text: str) -> int:
    """`32768K` -> bytes."""
    units = {"K": 1024, "M": 1024**2, "G": 1024**3}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
