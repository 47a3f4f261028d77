"""The inputs on which targets are timed: real images, or numbers drawn at random."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.errors import InputError
from deploy.bench_settings import Settings
from deploy.bench_targets import Opening
from deploy.pool import FLOATS, last_level_cache_bytes, pool_images, random_inputs, write_pool
from deploy.tensor_spec import TensorSpec


def write_inputs(pool: Path, specs: Sequence[TensorSpec], settings: Settings, opening: Opening) -> str:
    """Write the inputs; say what they are."""
    sample_bytes = sum(
        int(np.prod([size for size in spec.shape[1:] if isinstance(size, int)])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
    cache = last_level_cache_bytes()
    count = max(pool_images(size, sample_bytes, cache) for size in settings.batch_sizes)
    if settings.data is None:
        write_pool(pool, random_inputs(specs, count, settings.seed))
        floats = all(spec.dtype in FLOATS for spec in specs)
        what = "random, standard normal" if floats else "random: floats standard normal, integers from 0 to 9"
    else:
        write_pool(pool, [_images(settings.data, specs, count, opening)])
        what = settings.data
    return f"{what}; {count} samples of {sample_bytes} bytes, with a last-level cache of {cache} bytes"


def _images(source: str, specs: Sequence[TensorSpec], count: int, opening: Opening) -> np.ndarray:
    """Images of the test split, again from the beginning where there are too few: at other places in memory."""
    from compress import data
    from deploy.stages import sample_images

    shape = specs[0].shape[1:]
    if len(specs) != 1 or len(shape) != 3 or specs[0].dtype not in FLOATS:
        raise InputError(
            f"--data gives images, but the network takes {'; '.join(map(str, specs))}: leave --data out, and its "
            "inputs are drawn at random."
        )
    side = shape[-1] if isinstance(shape[-1], int) else None
    loaded = data.load(source, batch_size=64, image_size=side, augment=False, trust=opening.trust)
    if loaded.image_shape != shape:
        raise InputError(f"{source} has images of {loaded.image_shape}, but the network takes {shape}: give others.")
    images = sample_images(loaded, at_least=1, at_most=count).numpy()
    return np.resize(images, (count, *shape))
