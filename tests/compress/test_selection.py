"""Selection: which channels go, by hand and for any scores."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.budget import ChannelCost, cost_model
from compress.graph import trace
from compress.selection import select


def two_groups(first: int, second: int):
    model = nn.Sequential(nn.Linear(3, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2))
    return model, trace(model, torch.ones(1, 3))


def scored(first: list[float], second: list[float]) -> dict[str, Tensor]:
    return {"0": torch.tensor(first, dtype=torch.double), "2": torch.tensor(second, dtype=torch.double)}


def lists(removals: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: channels.tolist() for name, channels in removals.items()}


def test_least_important_channels_go_over_all_groups() -> None:
    _, graph = two_groups(3, 2)
    choice = select(scored([5, 1, 3], [2, 9]), graph, ChannelCost(), 2, round_to=1, min_channels=1)
    assert lists(choice.removals) == {"0": [1, 2], "2": [0]}
    assert (choice.cost, choice.exhausted) == (2, False)


def test_widths_are_multiples_and_blocks_rank_by_their_mean() -> None:
    _, graph = two_groups(6, 4)
    # Blocks of two. First group: (1, 2) mean 1.5, (3, 9) mean 6; second: (4, 4) mean 4.
    choice = select(scored([9, 1, 2, 3, 10, 11], [4, 20, 4, 20]), graph, ChannelCost(), 6, round_to=2, min_channels=1)
    assert lists(choice.removals) == {"0": [1, 2], "2": [0, 2]}


def test_a_width_that_is_no_multiple_stays_or_becomes_one() -> None:
    _, graph = two_groups(7, 8)
    choice = select(scored([1.0] * 7, [2.0] * 8), graph, ChannelCost(), 14, round_to=4, min_channels=1)
    assert lists(choice.removals) == {"0": [0, 1, 2]}  # 7 -> 4: one channel would do, but 6 is no multiple of 4
    choice = select(scored([2.0] * 7, [1.0] * 8), graph, ChannelCost(), 11, round_to=4, min_channels=1)
    assert lists(choice.removals) == {"2": [0, 1, 2, 3]}


def test_never_below_min_channels_and_says_when_exhausted() -> None:
    _, graph = two_groups(5, 5)
    choice = select(scored([1.0] * 5, [1.0] * 5), graph, ChannelCost(), 2, round_to=1, min_channels=3)
    assert choice.exhausted
    assert choice.cost == 6


def test_blocks_that_are_not_needed_come_back() -> None:
    _, graph = two_groups(2, 20)
    model = _Weighted({"0": 10.0, "2": 1.0})
    # One of the second group's channels (score 1) goes first and saves 1; then one of the first's (score 2) saves 10.
    choice = select(scored([2, 3], [1] + [9] * 19), graph, model, 40 - 10, round_to=1, min_channels=1)
    assert lists(choice.removals) == {"0": [0]}
    assert choice.cost == 30


class _Weighted:
    def __init__(self, price: dict[str, float]) -> None:
        self.price = price

    def cost(self, widths) -> float:
        return sum(self.price[name] * width for name, width in widths.items())

    def gain(self, group, widths, new_width) -> float:
        return self.price[group] * (widths[group] - new_width)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_for_any_scores_and_budget(data: st.DataObject) -> None:
    first, second = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 24))
    model, graph = _NETS.setdefault((first, second), two_groups(first, second))
    numbers = st.floats(0, 1e6, allow_nan=False)
    scores = scored(
        data.draw(st.lists(numbers, min_size=first, max_size=first)),
        data.draw(st.lists(numbers, min_size=second, max_size=second)),
    )
    round_to, least = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 6))
    costs = cost_model(data.draw(st.sampled_from(["macs", "parameters", "channels"])), model, graph)
    target = data.draw(st.floats(0.01, 1)) * costs.cost(graph.widths)
    choice = select(scores, graph, costs, target, round_to=round_to, min_channels=least)
    widths = graph.widths
    for name, channels in choice.removals.items():
        width = widths[name]
        kept = set(range(width)) - set(channels.tolist())
        assert max(scores[name][channels].tolist()) <= min(scores[name][sorted(kept)].tolist())
        widths[name] = len(kept)
        assert widths[name] % round_to == 0
        assert widths[name] >= least
    assert abs(costs.cost(widths) - choice.cost) <= 1e-6 * costs.cost(graph.widths)
    assert choice.exhausted or choice.cost <= target * (1 + 1e-6)
    if choice.exhausted:
        smallest = -(-least // round_to) * round_to
        assert all(width <= smallest or width < round_to + smallest for width in widths.values())


_NETS: dict = {}
