"""The measured change of loss against plain loops over copies; resumption; greedy and exhaustive search."""

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_importance import Residual
from test_removal_equals_zeroing import zeroed
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import InputError
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, oracle
from compress.importance.ablation import AblatedMinibatch, Ablation
from compress.importance.oracle import Removed, changes_of_loss, combinatorial, greedy, reduce

CLOSE = {"rtol": 1e-8, "atol": 1e-12}
WIDTHS = {"stem": 6, "inner": 5}


class Counting:
    """A loss function that counts its calls and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, output: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return F.cross_entropy(output, torch.arange(len(output)) % 3)


def minibatches(count: int, loss: Callable[[Tensor], Tensor] | None = None) -> list[Minibatch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 4, 2, 8, 8, generator=generator, dtype=torch.double)
    return [Minibatch((part,), loss or Counting()) for part in images]


def prepared() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = Residual().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    graph = trace(model, minibatches(1)[0].inputs)
    assert graph.widths == WIDTHS
    return model, graph


def slow_loss(
    model: nn.Module, graph: ChannelGraph, batches: list[Minibatch], channels: Mapping[str, list[int]]
) -> float:
    """Mean over the minibatches without these channels."""
    bare = zeroed(model, graph, {name: torch.tensor(gone, dtype=torch.int64) for name, gone in channels.items()})
    with torch.no_grad():
        return sum(float(one.loss(bare(*one.inputs))) for one in batches) / len(batches)


def states(model: nn.Module, graph: ChannelGraph, batches: list[Minibatch]) -> list[AblatedMinibatch]:
    ablation = Ablation(model, graph, batches[0])
    return [ablation.on(one) for one in batches]


def test_changes_of_loss_are_those_of_a_plain_loop() -> None:
    model, graph = prepared()
    model.train()  # the measurement is in evaluation mode all the same
    batches = minibatches(2)
    changes = changes_of_loss(model, graph, batches)
    assert model.training
    model.eval()
    expected = [
        [
            slow_loss(model, graph, [one], {name: [channel]}) - slow_loss(model, graph, [one], {})
            for name, width in WIDTHS.items()
            for channel in range(width)
        ]
        for one in batches
    ]
    torch.testing.assert_close(changes, torch.tensor(expected, dtype=torch.double), **CLOSE)


def test_reductions_by_hand() -> None:
    changes = torch.tensor([[1.0, -2.0, 0.5], [3.0, 2.0, -0.5]], dtype=torch.double)
    assert reduce(changes, "squared").tolist() == [5.0, 4.0, 0.25]
    assert reduce(changes, "absolute").tolist() == [2.0, 2.0, 0.5]
    assert reduce(changes, "signed").tolist() == [2.0, 0.0, 0.0]


def interrupted(model: nn.Module, graph: ChannelGraph, saved: Path, fails_at: int, identity: str = "") -> None:
    with pytest.raises(KeyboardInterrupt):
        changes_of_loss(model, graph, minibatches(2, Counting(fails_at)), saved=saved, identity=identity)


def test_a_killed_measurement_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_SAVE_SECONDS", -1.0)
    model, graph = prepared()
    saved = tmp_path / "oracle.safetensors"
    straight = Counting()
    expected = changes_of_loss(model, graph, minibatches(2, straight))
    overhead = straight.calls - 2 * 11 - 2  # of comparing the parts with the whole
    # All of the first minibatch, the first group of the second, and the first two channels of its second group.
    interrupted(model, graph, saved, overhead + (1 + 11) + (1 + 6) + 3)
    with safe_open(saved, framework="pt") as file:
        assert int(file.get_tensor("changes").isnan().sum()) == 5
    resumed = Counting()
    changes = changes_of_loss(model, graph, minibatches(2, resumed), saved=saved)
    assert resumed.calls == overhead + 1 + 5
    assert torch.equal(changes, expected)
    again = Counting()
    assert torch.equal(changes_of_loss(model, graph, minibatches(2, again), saved=saved), expected)
    assert again.calls == 0


def test_interrupted_more_than_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_SAVE_SECONDS", -1.0)
    model, graph = prepared()
    saved = tmp_path / "oracle.safetensors"
    expected = changes_of_loss(model, graph, minibatches(2))
    for fails_at in (12, 10):
        interrupted(model, graph, saved, fails_at)
    assert torch.equal(changes_of_loss(model, graph, minibatches(2), saved=saved), expected)


def test_without_time_passing_nothing_is_written_before_the_end(tmp_path: Path) -> None:
    model, graph = prepared()
    saved = tmp_path / "oracle.safetensors"
    interrupted(model, graph, saved, 16)
    assert not saved.exists()


def test_a_file_of_another_identity_is_begun_anew(tmp_path: Path) -> None:
    model, graph = prepared()
    saved = tmp_path / "oracle.safetensors"
    expected = changes_of_loss(model, graph, minibatches(1), saved=saved, identity="weights A")
    same, other = Counting(), Counting()
    changes_of_loss(model, graph, minibatches(1, same), saved=saved, identity="weights A")
    assert same.calls == 0
    with torch.no_grad():
        model.head.weight.mul_(2)
    changes = changes_of_loss(model, graph, minibatches(1, other), saved=saved, identity="weights B")
    assert other.calls >= 11
    assert not torch.equal(changes, expected)
    torch.testing.assert_close(changes, changes_of_loss(model, graph, minibatches(1)), **CLOSE)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "rubbish": lambda path: path.write_bytes(b"rubbish" * 100),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "without its tensor": lambda path: save_file({"other": torch.zeros(1)}, path, metadata={"identity": "me"}),
    "of another number of minibatches": lambda path: save_file(
        {"changes": torch.zeros(1, 11, dtype=torch.double)}, path, metadata={"identity": "me"}
    ),
    "without metadata": lambda path: save_file({"changes": torch.zeros(2, 11, dtype=torch.double)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_begun_anew(damage: str, tmp_path: Path) -> None:
    model, graph = prepared()
    saved = tmp_path / "oracle.safetensors"
    expected = changes_of_loss(model, graph, minibatches(2), saved=saved, identity="me")
    DAMAGE[damage](saved)
    counting = Counting()
    changes = changes_of_loss(model, graph, minibatches(2, counting), saved=saved, identity="me")
    assert counting.calls >= 22
    assert torch.equal(changes, expected)
    with safe_open(saved, framework="pt") as file:
        assert torch.equal(file.get_tensor("changes"), expected)


# --- sets of channels -----------------------------------------------------------------------------------------------


def slow_greedy(
    model: nn.Module, graph: ChannelGraph, batches: list[Minibatch], count: int, groups: list[str]
) -> list[Removed]:
    gone: dict[str, list[int]] = {name: [] for name in groups}
    order: list[tuple[str, int]] = []
    found = []
    for _ in range(count):
        tried = {}
        for name in groups:
            for channel in range(WIDTHS[name]):
                if channel not in gone[name] and len(gone[name]) < WIDTHS[name] - 1:
                    without = {**gone, name: [*gone[name], channel]}
                    tried[name, channel] = slow_loss(model, graph, batches, without)
        if not tried:
            break
        name, channel = min(tried, key=lambda key: tried[key])
        gone[name].append(channel)
        order.append((name, channel))
        found.append(Removed(tuple(order), tried[name, channel]))
    return found


@pytest.mark.parametrize(("count", "groups"), [(4, None), (20, ["inner"]), (20, None)])
def test_greedy_is_a_plain_loop(count: int, groups: list[str] | None) -> None:
    model, graph = prepared()
    batches = minibatches(2)
    found = greedy(states(model, graph, batches), graph, count, groups=groups)
    expected = slow_greedy(model, graph, batches, count, groups or list(WIDTHS))
    assert [step.channels for step in found] == [step.channels for step in expected]
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=1e-9)
    # One channel of every group stays.
    assert len(found) == min(count, sum(WIDTHS[name] - 1 for name in groups or WIDTHS))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_combinatorial_is_the_best_of_all_subsets(count: int) -> None:
    model, graph = prepared()
    batches = minibatches(2)
    found = combinatorial(states(model, graph, batches), graph, "stem", count)
    losses = {
        subset: slow_loss(model, graph, batches, {"stem": list(subset)}) for subset in combinations(range(6), count)
    }
    best = min(losses, key=lambda subset: losses[subset])
    assert found.channels == tuple(("stem", channel) for channel in best)
    assert found.loss == pytest.approx(losses[best], rel=1e-9)


def summing(values: list[float], target: float) -> tuple[ChannelGraph, list[AblatedMinibatch]]:
    """A network whose loss is (sum of the values of the channels present − target)²."""
    model = nn.Sequential(nn.Linear(1, len(values), bias=False), nn.Linear(len(values), 1, bias=False)).double()
    model[0].weight.data = torch.tensor(values, dtype=torch.double)[:, None]
    nn.init.ones_(model[1].weight)
    one = Minibatch((torch.ones(2, 1, dtype=torch.double),), lambda output: (output - target).square().mean())
    graph = trace(model, one.inputs)
    return graph, states(model, graph, [one])


def test_more_subsets_than_one_portion_are_all_measured() -> None:
    values = [math.sqrt(number) for number in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)]
    graph, ready = summing(values, target=sum(values[:7]))
    assert math.comb(13, 6) > 1024
    found = combinatorial(ready, graph, "0", 6)
    # Only without the last six channels, the last of all 1716 subsets, does the sum hit the target.
    assert found.channels == tuple(("0", channel) for channel in range(7, 13))
    assert found.loss == pytest.approx(0, abs=1e-20)


def test_greedy_can_be_worse_than_combinatorial() -> None:
    """The one removal that comes nearest to 8.5 takes 7.5 away; the best pair is 4 and 4."""
    graph, ready = summing([4.0, 4.0, 7.5, 1.0], target=8.5)
    steps = greedy(ready, graph, 2)
    assert [step.channels[-1] for step in steps] == [("0", 2), ("0", 3)]
    assert [step.loss for step in steps] == pytest.approx([0.25, 0.25])
    assert combinatorial(ready, graph, "0", 2) == Removed((("0", 0), ("0", 1)), 0.0)


def test_what_cannot_be_searched_is_one_sentence() -> None:
    graph, ready = summing([1.0, 2.0, 3.0, 4.0], target=0.0)
    for count in (0, 4, -1):
        with pytest.raises(
            InputError, match=rf"count is {count}.* of .*4 channels .*at least one must go and one stay"
        ):
            combinatorial(ready, graph, "0", count)
    with pytest.raises(InputError, match=r"0 has 6 subsets of 2 of its 4 channels, more than 5: use greedy\."):
        combinatorial(ready, graph, "0", 2, limit=5)
    assert combinatorial(ready, graph, "0", 2, limit=6).channels == (("0", 2), ("0", 3))
    assert greedy(ready, graph, 0) == []
