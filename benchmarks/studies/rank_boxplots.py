"""Ranks of channels by layer, before and after pruning (Molchanov et al. 2019, figure 5).

python -m benchmarks.studies.rank_boxplots --out DIR

All channels of a network are ranked together by their Taylor scores: 0 is the least important one, 1 the most.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from benchmarks.harness.figures import colour, figure
from benchmarks.studies.networks import SETTINGS, TITLES, Name, spread, taylor_scores, trained
from benchmarks.studies.study import Cells, Finding, Options, options, publish
from compress.budget import Budget
from compress.graph import trace
from compress.pruner import Pruner
from compress.training import TrainingConfig, evaluate, fit

FIRST: dict[Name, tuple[str, ...]] = {"lenet3": ("conv1",), "resnet20": ("conv1", "stage1")}
"""How the groups of the first stage begin; `conv1` of ResNet-20 is the residual stream of its first stage."""
LAST: dict[Name, tuple[str, ...]] = {"lenet3": ("fc2",), "resnet20": ("stage3",)}
STREAMS = ("conv1", "stage2.0.conv2", "stage3.0.conv2")
"""The groups of ResNet-20 that are residual streams."""
WHEN = {"before": "before", "after": "right after pruning", "tuned": "after fine-tuning"}
MACS_KEPT = 0.5
EVENTS, INTERVAL = 16, 4
MINIBATCHES = 64
"""Minibatches behind each of the two rankings that are compared."""
BETWEEN = TrainingConfig(learning_rate=0.01, weight_decay=5e-4, schedule="constant")
AFTER = TrainingConfig(epochs=2, learning_rate=0.02, weight_decay=5e-4, nesterov=True)
LOWEST = 0.25
"""Channels of a rank below this count as lowest-ranked."""

Ranks = Mapping[str, Sequence[float]]
"""Group -> ranks of its channels, in [0, 1]."""


def normalised_ranks(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Rank every channel among those of all groups: 0 for the lowest score, 1 for the highest; ties share their mean.

    There must be at least two channels.
    """
    every = torch.cat(list(scores.values())).numpy()
    ranks = (rankdata(every) - 1) / (len(every) - 1)
    ends = np.cumsum([len(values) for values in scores.values()])[:-1]
    return {name: part.tolist() for name, part in zip(scores, np.split(ranks, ends), strict=True)}


def median_spread(ranks: Ranks) -> float:
    """Standard deviation, over the groups, of the median rank of a group."""
    return float(np.std([np.median(values) for values in ranks.values()]))


def lowest_in(ranks: Ranks, prefixes: tuple[str, ...]) -> tuple[float, float]:
    """Which part of the lowest-ranked channels, and of all channels, stands in groups whose name begins so."""
    here = np.concatenate([np.asarray(values) for name, values in ranks.items() if name.startswith(prefixes)])
    every = np.concatenate([np.asarray(values) for values in ranks.values()])
    return float((here < LOWEST).sum() / (every < LOWEST).sum()), len(here) / len(every)


def ranked(name: Name, seed: int, options: Options) -> dict[str, Any]:
    """Rank a dense network's channels, prune it to half of its MACs while it trains, and rank what is left.

    Returns:
        before: group -> ranks of all channels; survivors: the same of those that remain after pruning.
        after, tuned: group -> ranks of the remaining channels among themselves, in the network right after pruning
            and after fine-tuning.
        top1: in percent, of the dense, the pruned and the fine-tuned network.
        macs_kept: fraction of the multiply-adds.
    """
    dense, loaded = trained(name, "digits", seed, options)
    model = deepcopy(dense)
    example = torch.zeros(1, *loaded.image_shape)
    before = normalised_ranks(taylor_scores(dense, trace(dense, example), loaded, MINIBATCHES, seed=seed))
    top1 = {"dense": evaluate(dense, loaded.test).top1}
    pruner = Pruner(model, example, budget=Budget(macs=MACS_KEPT), events=EVENTS, interval=INTERVAL, round_to=1)
    fit(model, loaded.train, BETWEEN, seed=seed, pruner=pruner, description=f"pruning {name}-{seed}")
    left = {group: part.kept.tolist() for group, part in pruner.graph.groups.items()}
    found = {}
    for when in ("after", "tuned"):
        if when == "tuned":
            fit(model, loaded.train, AFTER, seed=seed, description=f"fine-tuning {name}-{seed}")
        top1["pruned" if when == "after" else "tuned"] = evaluate(model, loaded.test).top1
        found[when] = normalised_ranks(taylor_scores(model, pruner.graph, loaded, MINIBATCHES, seed=seed))
    survivors = {group: [before[group][channel] for channel in channels] for group, channels in left.items()}
    return {"before": before, "survivors": survivors, **found, "top1": top1, "macs_kept": pruner.kept}


def findings(found: Mapping[Name, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """What the ranks of every network say, means over seeds."""
    drawn = "figure 5 draws the ranks by layer; no number to compare"
    spreads, lowest, removed, stable, streams = [], [], [], [], []
    for name, title in TITLES.items():
        runs = found[name]
        before, after, tuned = (np.array([median_spread(run[w]) for run in runs]) for w in ("before", "after", "tuned"))
        spreads.append(
            f"{title}: {spread(before)} before, {spread(after)} after (narrower with {int((after < before).sum())} of "
            f"{len(runs)} seeds), {spread(tuned)} after fine-tuning ({int((tuned < before).sum())} of {len(runs)})"
        )
        places = {"first": FIRST[name], "last": LAST[name]}
        for (place, prefixes), when in product(places.items(), ("before", "after")):
            low, every = 100 * np.array([lowest_in(run[when], prefixes) for run in runs]).T
            lowest.append(f"{title}, {place} stage {when}: {spread(low, 0)} %, of all channels {spread(every, 0)} %")
        gone = {
            place: np.array([100 * removed_share(run, prefixes) for run in runs])
            for place, prefixes in {**places, "whole network": ("",)}.items()
        }
        removed.append(f"{title}: " + ", ".join(f"{place} {spread(part, 0)} %" for place, part in gone.items()))
        agreement = {
            when: np.array([spearmanr(flat(run["survivors"]), flat(run[when])).statistic for run in runs])
            for when in ("after", "tuned")
        }
        stable.append(f"{title}: {spread(agreement['after'])}, after fine-tuning {spread(agreement['tuned'])}")
    for when in ("before", "after", "tuned"):
        inside, outside = (
            np.array([median_rank(run[when], part) for run in found["resnet20"]]) for part in (True, False)
        )
        streams.append(f"{WHEN[when]} {spread(inside)} against {spread(outside)}")
    return [
        Finding("Spread (standard deviation) of the layers' median ranks", drawn, "; ".join(spreads), None),
        Finding(
            f"Share of the lowest {100 * LOWEST:.0f} % of ranks that stands in a stage", drawn, "; ".join(lowest), None
        ),
        Finding("Share of a stage's channels that was removed", drawn, "; ".join(removed), None),
        Finding("ResNet-20: median rank, residual streams against all others", drawn, "; ".join(streams), None),
        Finding("Spearman correlation of the survivors' ranks before and after", drawn, "; ".join(stable), None),
    ]


def median_rank(ranks: Ranks, streams: bool) -> float:
    """Median rank of the channels in residual streams, or of all others."""
    return float(np.median(np.concatenate([ranks[group] for group in ranks if (group in STREAMS) == streams])))


def removed_share(run: Mapping[str, Any], prefixes: tuple[str, ...]) -> float:
    """Fraction of the channels of these groups that pruning removed."""
    dense, left = (
        sum(len(values) for group, values in run[when].items() if group.startswith(prefixes))
        for when in ("before", "after")
    )
    return 1 - left / dense


def flat(ranks: Ranks) -> np.ndarray:
    return np.concatenate([np.asarray(values) for values in ranks.values()])


def boxplots(runs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One row of boxes for each ranking, one box for each group; the channels of all seeds together."""
    rows = {
        "before: all channels": "before",
        "before: those that will stay": "survivors",
        "right after pruning: ranked anew": "after",
        "after fine-tuning: ranked anew": "tuned",
    }
    groups = list(runs[0]["before"])
    drawing, axes = figure(len(rows), 1, width_in=max(6.0, 1.6 + 0.62 * len(groups)), height_in=9.0)
    for index, (label, when) in enumerate(rows.items()):
        panel = axes[index, 0]
        ranks = [np.concatenate([run[when][group] for run in runs]) for group in groups]
        panel.boxplot(
            ranks,
            widths=0.6,
            patch_artist=True,
            boxprops={"facecolor": colour(index), "alpha": 0.35},
            medianprops={"color": "black", "linewidth": 2},
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "#888888"},
        )
        widths = [np.mean([len(run[when][group]) for run in runs]) for group in groups]
        names = [f"{group.replace('stage', 's')}\n{width:.0f}" for group, width in zip(groups, widths, strict=True)]
        panel.set_xticks(range(1, len(groups) + 1), names, fontsize=8)
        panel.set(title=f"{title}, {label}", ylim=(-0.03, 1.03), ylabel="rank")
        panel.grid(visible=False, axis="x")
    axes[-1, 0].set_xlabel("channel group, and its mean number of channels")
    return drawing


def run(options: Options) -> None:
    """Compute what is missing and publish the page."""
    settings = {
        "networks": {name: asdict(SETTINGS[name, "digits"]) for name in TITLES},
        "macs_kept": MACS_KEPT,
        "after": AFTER.model_dump(mode="json"),
        "events": EVENTS,
        "interval": INTERVAL,
        "minibatches": MINIBATCHES,
        "between": BETWEEN.model_dump(mode="json"),
    }
    cells = Cells(options, "rank_boxplots", settings)
    seeds = range(1 if options.quick else 3)
    found: dict[Name, list[dict[str, Any]]] = {
        name: [cells.get(f"{name}-{seed}", partial(ranked, name, seed, options)) for seed in seeds] for name in TITLES
    }
    networks = "; ".join(
        f"{title}: {spread(np.array([100 * run['macs_kept'] for run in found[name]]), 1)} % of the MACs kept, top-1 "
        + " and ".join(
            f"{spread(np.array([run['top1'][which] for run in found[name]]), 1)} % {which}"
            for which in ("dense", "pruned", "tuned")
        )
        for name, title in TITLES.items()
    )
    publish(
        options,
        study="rank_boxplots",
        title="Ranks of channels by layer",
        question="Molchanov et al. 2019 (arXiv 1906.10771), figure 5: how do the ranks of the channels lie in the "
        "layers of a network, before and after pruning?",
        findings=findings(found),
        results={"settings": settings, "runs": found},
        figures={name: boxplots(found[name], title) for name, title in TITLES.items()},
        notes=(
            f"Handwritten digits, {len(seeds)} seed(s); numbers are means over seeds, with the smallest and the "
            f"largest in brackets. {EVENTS} events, {INTERVAL} minibatches of training apart; fine-tuning is "
            f"{AFTER.epochs} epochs. {networks}.",
            "A box is a channel group, in the order of the forward pass; a residual stream is one group, named after "
            "its first convolution. The number below the name is that of its channels. Boxes span the quartiles, "
            "whiskers reach 1.5 times as far beyond them.",
            "A rank is a channel's place among all channels of its network, by Taylor score over "
            f"{MINIBATCHES} minibatches: 0 is the least important. The second row shows the old ranks of those that "
            "stay; below it the same channels are scored in the pruned network and ranked among themselves. Channels "
            "of equal score share a rank: those of LeNet3 that no image activates all have the score 0.",
            "No finding is judged: the paper's text could not be read where this was written, and its figure is of "
            "a larger network and other data.",
        ),
        seconds=cells.seconds,
    )


def main() -> None:
    run(options(__doc__))


if __name__ == "__main__":
    main()
