"""Attention modules cut by hand compute what the dense ones do with zeros in the same places."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case
from torch import Tensor, nn

import compress.attention  # noqa: F401
from compress.removal import keep_slices

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than these tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def compare(case: Case, kept: dict[tuple[str, int], Tensor]) -> nn.Module:
    zeroed, x = case.make(), case.input()
    pruned = copy.deepcopy(zeroed)
    case.zero(zeroed, kept)
    keep_slices(pruned, kept)
    for training in (True, False):
        zeroed.train(training)
        pruned.train(training)
        same(case.call(pruned, x), case.call(zeroed, x))
    case.call(pruned, x).sum().backward()
    return pruned


@every_case
def test_heads_removed_equal_heads_zeroed(case: Case) -> None:
    dense = type(case.make())
    pruned = compare(case, case.positions(h=(0, 2, 3)))
    assert isinstance(pruned, dense)
    assert (type(pruned) is not dense) == case.swapped
    assert list(dict(pruned.named_parameters())) == list(dict(case.make().named_parameters()))


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.kept], ids=[n for n, c in CASES.items() if c.kept]
)
def test_columns_removed_equal_columns_zeroed(case: Case) -> None:
    compare(case, case.positions(**case.kept))


@every_case
def test_heads_then_columns_then_heads_again(case: Case) -> None:
    zeroed, x = case.make(training=False), case.input()
    pruned = copy.deepcopy(zeroed)
    columns = case.kept or {}
    case.zero(zeroed, case.positions(h=(0, 3), **columns))
    case.zero(zeroed, case.positions(h=(0, 3)))
    if columns:
        case.zero(zeroed, case.positions(**columns))
    keep_slices(pruned, case.positions(h=(0, 2, 3)))
    case = replace(case, sizes={**case.sizes, "h": 3})
    if columns:
        keep_slices(pruned, case.positions(**columns))
        case = replace(case, sizes={**case.sizes, **{axis: len(kept) for axis, kept in columns.items()}})
    pruned = pickle.loads(pickle.dumps(copy.deepcopy(pruned)))  # noqa: S301  (our own bytes)
    keep_slices(pruned, case.positions(h=(0, 2)))
    same(case.call(pruned, x), case.call(zeroed, x))


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.stream], ids=[n for n, c in CASES.items() if c.stream]
)
def test_a_narrower_stream(case: Case) -> None:
    axis, left = case.shape.index(-1), torch.tensor([0, 2, 3, 5, 7])
    dense, x = case.make(training=False), case.input()
    pruned = copy.deepcopy(dense)
    gone = torch.tensor([1, 4, 6])
    expected = case.call(dense, x.index_fill(axis, gone, 0.0)).index_select(axis, left)
    slots = [slot.rsplit(":", 1) for slot in case.stream]
    keep_slices(pruned, {(tensor, int(dim)): left for tensor, dim in slots})
    same(case.call(pruned, x.index_select(axis, left)), expected)
    zeroed = case.make(training=False)
    kept = case.positions(h=(1, 2))
    case.zero(zeroed, kept)
    expected = case.call(zeroed, x.index_fill(axis, gone, 0.0)).index_select(axis, left)
    keep_slices(pruned, kept)
    same(case.call(pruned, x.index_select(axis, left)), expected)
