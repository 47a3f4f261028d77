import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from compress.errors import InputError
from deploy import pool
from deploy.pool import last_level_cache_bytes, pool_images, random_inputs, read_arrays, read_pool, write_pool
from deploy.tensor_spec import TensorSpec

MIB = 1024**2
IMAGES = TensorSpec("images", "float32", ("batch", 1, 2))


def samples(count: int) -> np.ndarray:
    """Sample number n is (n, -n)."""
    numbers = np.arange(count, dtype=np.float32)
    return np.stack([numbers, -numbers], axis=-1).reshape(count, 1, 2)


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_whole_batches_in_order_as_views(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", [samples(7)])
    batches = read_pool(tmp_path / "pool", (IMAGES,), 3)
    assert [batch["images"][:, 0, 0].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]  # 6 fills no batch
    assert all(batch["images"].flags.c_contiguous and not batch["images"].flags.owndata for batch in batches)
    assert batches[0]["images"].base is batches[1]["images"].base


def test_inputs_correspond_by_position(tmp_path: Path) -> None:
    write_pool(tmp_path, [samples(2), np.array([5, 6])])
    specs = (TensorSpec("x", "float32", ("batch", None, 2)), TensorSpec("count", "int64", ("batch",)))
    found = read_pool(tmp_path, specs, 1)
    assert [list(batch) for batch in found] == [["x", "count"]] * 2
    assert [batch["count"].tolist() for batch in found] == [[5], [6]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_floats_are_cast_to_what_the_network_takes(tmp_path: Path, dtype: str) -> None:
    write_pool(tmp_path, [samples(2) / 3])
    (batch,) = read_pool(tmp_path, (TensorSpec("images", dtype, ("batch", 1, 2)),), 2)
    assert batch["images"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(batch["images"], (samples(2) / 3).astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "bool", "int64"])
def test_dtypes_survive_the_disk(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0], [1], [3]]).astype(dtype)
    write_pool(tmp_path, [array])
    (found,) = read_arrays(tmp_path)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_bfloat16_of_the_pool_for_a_network_in_float32(tmp_path: Path) -> None:
    write_pool(tmp_path, [samples(1).astype(ml_dtypes.bfloat16)])
    (batch,) = read_pool(tmp_path, (IMAGES,), 1)
    assert batch["images"].dtype == np.float32


@pytest.mark.parametrize(
    ("specs", "batch_size", "message"),
    [
        ((IMAGES, IMAGES), 1, r"holds 1 inputs, but the network takes 2 \(images: float32 \(batch, 1, 2\); images"),
        ((TensorSpec("x", "int64", ("batch", 1, 2)),), 1, r"Input 0 .* dtype float32, but .*x: int64.*as int64"),
        ((TensorSpec("x", "float32", ("batch", 3, 2)),), 1, r"shape \(1, 1, 2\), but the network takes x: .*3, 2\)"),
        ((TensorSpec("x", "float32", (4, 1, 2)),), 2, r"shape \(2, 1, 2\), but the network takes x: float32 \(4, 1, 2"),
        ((IMAGES,), 6, r"A batch of 6 was asked for, but the pool .* holds 5 samples"),
        ((IMAGES,), 0, r"takes images: "),
    ],
)
def test_pools_that_do_not_fit(tmp_path: Path, specs: tuple[TensorSpec, ...], batch_size: int, message: str) -> None:
    write_pool(tmp_path, [samples(5)])
    with pytest.raises(InputError, match=message):
        read_pool(tmp_path, specs, batch_size)


def test_pools_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read the pool .*absent: No such file or directory; write it first"):
        read_arrays(tmp_path / "absent")
    write_pool(tmp_path, [samples(5)])
    index = tmp_path / "pool.json"
    for text in ("{", "{}", '{"samples": 5, "dtypes": ["float64"]}', '{"samples": 5, "dtypes": ["float99"]}', "\xff"):
        index.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="is damaged, or no pool at all"):
            read_arrays(tmp_path)
    index.write_text(json.dumps({"samples": 4, "dtypes": ["float32"]}))
    with pytest.raises(InputError, match="does not hold 4 samples of each input"):
        read_arrays(tmp_path)
    index.write_text(json.dumps({"samples": 5, "dtypes": ["float32", "float32"]}))
    with pytest.raises(InputError, match="Cannot read"):
        read_arrays(tmp_path)


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_pool_that_was_cut_off(tmp_path: Path, kept: int) -> None:
    write_pool(tmp_path, [samples(5)])
    file = tmp_path / "0.npy"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged"):
        read_arrays(tmp_path)


def test_pickled_objects_are_not_read(tmp_path: Path) -> None:
    write_pool(tmp_path, [samples(5)])
    np.save(tmp_path / "0.npy", np.array([{}] * 5), allow_pickle=True)
    with pytest.raises(InputError, match="is damaged"):
        read_arrays(tmp_path)


def test_pools_that_cannot_be_written(tmp_path: Path) -> None:
    for arrays in ([], [np.float32(1)], [samples(0)], [samples(2), samples(3)]):
        with pytest.raises(InputError, match="arrays of the same number of samples"):
            write_pool(tmp_path / "pool", [np.asarray(array) for array in arrays])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        write_pool(tmp_path / "file" / "pool", [samples(2)])


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "image_bytes", "cache", "expected"),
    [
        (1, MIB, 32 * MIB, 64),  # twice the cache
        (4, MIB, 32 * MIB, 64),
        (3, MIB, 32 * MIB, 66),  # 21.3 batches
        (1, 8, 32 * MIB, 16_384),  # at most so many batches
        (2, 8, 32 * MIB, 32_768),
        (1, MIB, 1024 * MIB, 512),  # at most 512 MiB
        (8, MIB, 1024 * MIB, 512),
        (600, MIB, 32 * MIB, 600),  # one batch is always held
        (1, 100 * MIB, 32 * MIB, 1),
        (1, 20 * MIB, 32 * MIB, 4),
    ],
)
def test_pool_images(batch_size: int, image_bytes: int, cache: int, expected: int) -> None:
    assert pool_images(batch_size, image_bytes, cache) == expected


def test_the_last_level_is_the_highest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CACHES", tmp_path)
    assert last_level_cache_bytes() == 32 * MIB
    for index, (level, size) in enumerate([("1", "48K"), ("3", "36608K"), ("2", "2M"), ("4", "unknown")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    (tmp_path / "index9").mkdir()
    assert last_level_cache_bytes() == 36_608 * 1024


def test_the_cache_of_this_machine() -> None:
    assert last_level_cache_bytes() >= 64 * 1024


# --- random inputs ---------------------------------------------------------------------------------------------------


def test_random_inputs_by_type() -> None:
    specs = [
        TensorSpec("x", "float16", ("batch", 3, 50)),
        TensorSpec("token", "int64", ("batch", 100)),
        TensorSpec("pixel", "uint8", ("batch", 100)),
        TensorSpec("mask", "bool", ("batch", 100)),
    ]
    x, token, pixel, mask = random_inputs(specs, 40, seed=1)
    assert [array.dtype.name for array in (x, token, pixel, mask)] == ["float32", "int64", "uint8", "bool"]
    assert x.shape == (40, 3, 50)
    assert (abs(x.mean()) < 0.05, abs(x.std() - 1) < 0.05) == (True, True)
    assert (token.min(), token.max(), pixel.min(), pixel.max()) == (0, 9, 0, 9)
    assert 0.4 < mask.mean() < 0.6
    np.testing.assert_array_equal(random_inputs(specs, 40, seed=1)[0], x)
    assert (random_inputs(specs, 40, seed=2)[0] != x).any()


def test_open_sizes_must_be_given() -> None:
    spec = TensorSpec("images", "float32", ("batch", 3, "height", None))
    with pytest.raises(InputError, match=r"images: float32 \(batch, 3, height, \?\).*--shape images=3,224,224"):
        random_inputs([spec], 2, seed=0)
    (found,) = random_inputs([spec], 2, seed=0, shapes={"images": (3, 4, 6)})
    assert found.shape == (2, 3, 4, 6)
    for sizes in ((4, 4, 6), (3, 4), (3, 0, 6), (3, -1, 6)):
        with pytest.raises(InputError, match=r"was given for the input images: .*which it does not fit"):
            random_inputs([spec], 2, seed=0, shapes={"images": sizes})
    with pytest.raises(InputError, match="A shape was given for pictures, but the network takes images"):
        random_inputs([spec], 2, seed=0, shapes={"pictures": (3, 4, 6)})


def test_inputs_that_cannot_be_drawn() -> None:
    with pytest.raises(InputError, match="no axis for samples"):
        random_inputs([TensorSpec("x", "float32", ())], 2, seed=0)
    with pytest.raises(InputError, match="no inputs are drawn"):
        random_inputs([TensorSpec("x", "float8_e4m3fn", ("batch",))], 2, seed=0)
    with pytest.raises(InputError, match="do not fit into memory; give a smaller batch"):
        random_inputs([TensorSpec("x", "float32", ("batch", 2**40))], 2**10, seed=0)
