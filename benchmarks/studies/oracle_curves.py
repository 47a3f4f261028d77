"""Loss against channels removed without fine-tuning, criteria and oracles (Molchanov et al. 2019, figures 2 to 4).

python -m benchmarks.studies.oracle_curves --out DIR
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.harness.figures import colour, figure, legend
from benchmarks.studies.correlation import minibatches
from benchmarks.studies.networks import SETTINGS, spread, trained
from benchmarks.studies.study import Cells, Finding, Options, options, publish
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch
from compress.importance.ablation import Ablation
from compress.importance.comparison import build_all, score
from compress.importance.oracle import combinatorial, greedy

GROUP = "conv1"
"""LeNet3's first layer."""
OTHERS = ("conv2", "fc1", "fc2")
CRITERIA = (
    "oracle",
    "oracle:reduction=absolute",
    "oracle:reduction=signed",
    "taylor",
    "taylor-fg",
    "taylor-logits",
    "taylor-so",
    "taylor-so-full",
    "obd",
    "hessian",
    "hessian:estimator=hutchinson",
    "taylor-weight",
    "taylor-output",
    "magnitude",
    "magnitude:norm=l1",
    "random",
)
WIDE_CRITERIA = (
    "oracle",
    "taylor",
    "taylor:combine=mean",
    "taylor:combine=max",
    "taylor:combine=shared-gate",
    "taylor-fg",
    "taylor-logits",
    "hessian",
    "taylor-weight",
    "taylor-output",
    "bn-taylor",
    "bn-scale",
    "magnitude",
    "random",
)
"""Criteria on the whole of ResNet-20; exact second derivatives would take most of an hour."""
DEAR = ("oracle",)
"""Of these, those that quick mode has no time for."""
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Of the channels of ResNet-20 that are gone after each step."""
MINIBATCHES = 1
"""For LeNet3, whose 65,534 subsets are all measured; every seed has another one."""
WIDE_MINIBATCHES = 4
QUICK_SUBSETS = 4
"""In quick mode subsets of up to so many channels are tried; in full mode subsets of every size."""
SEEDS = 3
GREEDY, BEST = "greedy oracle", "best subset"

Curve = Sequence[float | None]
"""Loss after 1, 2, ... channels; None where it was not measured."""


def first_layer(seed: int, options: Options) -> dict[str, Any]:
    """Curves of LeNet3's first layer; criteria are scored again after every removal.

    Returns:
        loss: of the dense network. curves: name -> `Curve`.
    """
    model, _ = trained("lenet3", "digits", seed, options)
    batches = minibatches("digits", SETTINGS["lenet3", "digits"].image_size, MINIBATCHES, seed)
    graph = trace(model, batches[0].inputs[0][:2], ignore=OTHERS)
    ablation = Ablation(model, graph, batches[0])
    states = [ablation.on(batch) for batch in batches]
    width = graph.groups[GROUP].width
    sizes = range(1, (QUICK_SUBSETS if options.quick else width - 1) + 1)
    best = {size: combinatorial(states, graph, GROUP, size).loss for size in sizes}
    curves: dict[str, Curve] = {
        GREEDY: [removed.loss for removed in greedy(states, graph, width - 1)],
        BEST: [best.get(size) for size in range(1, width)],
    }
    for name in CRITERIA:
        curves[name] = _one_by_one(name, model, graph, batches)
    return {"loss": float(np.mean([state.loss for state in states])), "curves": curves}


def _one_by_one(name: str, model: nn.Module, graph: ChannelGraph, batches: Sequence[Minibatch]) -> list[float]:
    """Remove the channel of the lowest score for real, score again, and so on down to one channel; the losses."""
    model, graph = deepcopy(model), graph.copy()
    losses = []
    while graph.groups[GROUP].width > 1:
        built, _ = build_all([name], model, graph)
        scores, _ = score(model, built, batches)
        graph.remove_from(model, {GROUP: scores[name].values[GROUP].argmin()[None]})
        losses.append(_loss(model, batches))
    return losses


def whole_network(seed: int, options: Options) -> dict[str, Any]:
    """Curves of ResNet-20: the channels of all groups are ranked together, and ranked again after every step.

    Returns:
        loss: of the dense network. curves: name -> loss after each of `SHARES`.
    """
    model, _ = trained("resnet20", "digits", seed, options)
    batches = minibatches("digits", SETTINGS["resnet20", "digits"].image_size, WIDE_MINIBATCHES, seed)
    graph = trace(model, batches[0].inputs[0][:2])
    names = [name for name in WIDE_CRITERIA if not (options.quick and name in DEAR)]
    curves = {name: _step_by_step(name, model, graph, batches) for name in names}
    return {"loss": _loss(model, batches), "curves": curves}


def _step_by_step(name: str, model: nn.Module, graph: ChannelGraph, batches: Sequence[Minibatch]) -> list[float]:
    """Remove the lowest-ranked channels for real until each of `SHARES` is gone; the losses."""
    model, graph = deepcopy(model), graph.copy()
    total = sum(graph.widths.values())
    losses = []
    for share in SHARES:
        built, _ = build_all([name], model, graph)
        scores, _ = score(model, built, batches)
        gone = round(share * total) - (total - sum(graph.widths.values()))
        graph.remove_from(model, lowest(scores[name].values, gone))
        losses.append(_loss(model, batches))
    return losses


def lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Group -> its channels among the `count` lowest-scored ones of all groups; the best of each group stays."""
    joined = torch.cat(list(scores.values()))
    best = torch.cat([torch.arange(len(values)) == values.argmax() for values in scores.values()])
    gone = torch.zeros(len(joined), dtype=torch.bool)
    gone[joined.masked_fill(best, torch.inf).argsort(stable=True)[:count]] = True
    parts = gone.split([len(values) for values in scores.values()])
    return {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[Minibatch]) -> float:
    return float(np.mean([float(batch.loss(model(*batch.inputs))) for batch in batches]))


def excess(curve: Curve, reference: Curve) -> float:
    """Mean loss above a reference curve, over the sizes that both have, in nats."""
    pairs = [(mine, other) for mine, other in zip(curve, reference, strict=True) if None not in (mine, other)]
    return float(np.mean([mine - other for mine, other in pairs if mine is not None and other is not None]))


def findings(layer: Sequence[Mapping[str, Any]], wide: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the curves say, means over seeds."""
    above_best = np.array([excess(run["curves"][GREEDY], run["curves"][BEST]) for run in layer])
    above = {name: np.array([excess(run["curves"][name], run["curves"][GREEDY]) for run in layer]) for name in CRITERIA}
    ranked = sorted(above, key=lambda name: above[name].mean())
    area = {name: np.array([np.mean(run["curves"][name]) - run["loss"] for run in wide]) for name in wide[0]["curves"]}
    wide_ranked = sorted(area, key=lambda name: area[name].mean())
    rules = [name for name in area if name.partition(":")[0] == "taylor"]
    return [
        Finding(
            "The greedy oracle is as good as the best subset",
            "figures 2 to 4 draw these curves; no number that we know of",
            f"greedy is {spread(above_best, 4)} nats above the best subset on average",
            bool(above_best.mean() < 0.1 * np.mean([above["random"].mean(), 1e-9])),
        ),
        Finding(
            "Gate criteria come closest to the oracle in LeNet3's first layer",
            "figures 2 to 4 draw these curves; no number that we know of",
            "; ".join(f"{name} {spread(above[name], 3)}" for name in ranked) + " nats above greedy",
            bool(above["taylor"].mean() < min(above[name].mean() for name in ("magnitude", "random"))),
        ),
        Finding(
            "On the whole of ResNet-20, ranked again after every step",
            "not in the paper",
            "; ".join(f"{name} {spread(area[name], 2)}" for name in wide_ranked) + " nats over the dense network, "
            f"mean over {100 * SHARES[0]:.0f} to {100 * SHARES[-1]:.0f} % of the channels removed",
            None,
        ),
        Finding(
            "The joint rule removes with less loss than the other rules for a group's producers",
            "the authors' code uses one shared gate",
            "; ".join(f"{name} {spread(area[name], 2)}" for name in rules),
            bool(area["taylor"].mean() <= min(area[name].mean() for name in rules)),
        ),
    ]


def drawn(layer: Sequence[Mapping[str, Any]], wide: Sequence[Mapping[str, Any]]) -> Figure:
    """Left LeNet3's first layer, right the whole of ResNet-20; means over seeds."""
    drawing, axes = figure(1, 2, width_in=11, height_in=5.6)
    names = [GREEDY, BEST, *dict.fromkeys([*CRITERIA, *WIDE_CRITERIA])]
    looks = {name: (colour(index), ("-", "--", ":", "-.")[index // 7 % 4]) for index, name in enumerate(names)}
    looks |= {GREEDY: ("#000000", "-"), BEST: ("#e69f00", "--")}
    for panel, runs in zip(axes.flat, (layer, wide), strict=True):
        for name in names:
            if name not in runs[0]["curves"]:
                continue
            y = [
                float(np.mean(values)) if None not in values else np.nan
                for values in zip(*(run["curves"][name] for run in runs), strict=True)
            ]
            x = range(1, len(y) + 1) if panel is axes.flat[0] else [100 * share for share in SHARES]
            oracle = name in (GREEDY, BEST)  # what the others are judged by stands out
            width, order = (2.8, 3) if oracle else (1.4, 2)
            panel.plot(x, y, color=looks[name][0], linestyle=looks[name][1], linewidth=width, zorder=order, label=name)
        panel.set_yscale("log")
        panel.set_ylabel("loss (nats), no fine-tuning")
    axes.flat[0].set(xlabel="channels removed, of 16", title="LeNet3's first layer, scored after every removal")
    axes.flat[1].set(xlabel="channels removed, %", title="ResNet-20, ranked again after every 5 %")
    legend(drawing, axes.flat, columns=4)
    return drawing


def run(options: Options) -> None:
    """Measure every seed, then publish."""
    cells = Cells(options, "oracle_curves", {"criteria": CRITERIA, "wide": WIDE_CRITERIA, "shares": SHARES})
    seeds = range(1 if options.quick else SEEDS)
    parts = {"lenet3": first_layer, "resnet20": whole_network}
    runs = {
        name: [cells.get(f"{name}-{seed}", partial(measure, seed, options)) for seed in seeds]
        for name, measure in parts.items()
    }
    layer, wide = runs["lenet3"], runs["resnet20"]
    publish(
        options,
        study="oracle_curves",
        title="Loss against channels removed",
        question="How much loss does it cost to remove channels one after another, without fine-tuning, in the order "
        "of each criterion; and how far is that from the best that can be done?",
        findings=findings(layer, wide),
        results=runs,
        figures={"curves": drawn(layer, wide)},
        notes=[
            f"Digits, {len(seeds)} seeds. LeNet3: the loss is that of the minibatch of 64 training images, another "
            "one for every seed, on which everything is scored; after every removal all channels are scored again. "
            "The best subset of a size is found by measuring every subset of that size"
            + (f", up to {QUICK_SUBSETS} channels in quick mode." if options.quick else "."),
            "ResNet-20: the channels of all groups are ranked together, the lowest 5 % removed, and so on; no weight "
            "moves.",
        ],
        seconds=cells.seconds,
    )


def main() -> None:
    run(options(__doc__))


if __name__ == "__main__":
    main()
