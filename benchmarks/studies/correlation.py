"""Every criterion against the measured change of loss (Molchanov et al. 2019, section 4).

python -m benchmarks.studies.correlation --out DIR

The oracle and all criteria see the same minibatches of training images, in evaluation mode, without augmentation.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness.figures import colour, figure, legend
from benchmarks.studies.networks import BATCH_SIZE, SETTINGS, TITLES, Name, Source, spread, trained
from benchmarks.studies.networks import minibatches as training_minibatches
from benchmarks.studies.study import Cells, Finding, Options, options, publish
from compress import data
from compress.graph import trace
from compress.importance import Minibatch
from compress.importance.comparison import build_all, score
from compress.importance.oracle import changes_of_loss, reduce
from compress.training import evaluate
from deploy.agreement import ALL, RESIDUAL, compare, residual
from deploy.correlation_views import scatter

RULES = ("taylor", "taylor:combine=mean", "taylor:combine=max", "taylor:combine=shared-gate")
"""The joint rule for a group's producers, and the other three."""
CRITERIA = (
    *RULES,
    "taylor-fg",
    "taylor-logits",
    "taylor-so",
    "taylor-so-full",
    "obd",
    "hessian",
    "hessian:estimator=hutchinson",
    "taylor-weight",
    "taylor-output",
    "taylor-output:normalise=false",
    "bn-taylor",
    "bn-scale",
    "magnitude",
    "magnitude:norm=l1",
    "random",
)
MINIBATCHES: dict[tuple[Name, Source], int] = {
    ("lenet3", "digits"): 16,
    ("resnet20", "digits"): 16,
    ("lenet3", "glyphs"): 16,
    ("resnet20", "glyphs"): 6,
}
"""Minibatches of 64 images; fewer where a network is dear."""
LEFT_OUT: dict[tuple[Name, Source], tuple[str, ...]] = {("resnet20", "glyphs"): ("taylor-so", "obd")}
"""Exact second derivatives of ResNet-20 on 32 x 32 images take a quarter of an hour for each network."""
QUICK_MINIBATCHES = 6
SEEDS = 3

SHOWN: tuple[tuple[Name, Source], ...] = (
    ("resnet20", "digits"),
    ("resnet20", "glyphs"),
    ("lenet3", "digits"),
    ("lenet3", "glyphs"),
)

Run = Mapping[str, Any]
"""What `measured` returns."""


def minibatches(source: Source, image_size: int, count: int, seed: int) -> list[Minibatch]:
    """Minibatches of the training split without augmentation; as many passes over it as that takes."""
    loaded = data.load(source, batch_size=BATCH_SIZE, image_size=image_size, augment=False)
    pairs = training_minibatches(loaded, count, seed=seed)
    return [Minibatch((images,), partial(cross_entropy, target=labels)) for images, labels in pairs]


def measured(name: Name, source: Source, seed: int, options: Options) -> dict[str, Any]:
    """Oracle and criteria of one trained network.

    Returns:
        oracle: group -> scores. criteria: name -> group -> scores. residual: names of the residual groups.
        seconds: name -> that the criterion took for one minibatch, "oracle" and "forward and backward" among them.
        skipped: name -> why the criterion cannot score the network. top1: of the network, in percent.
    """
    model, loaded = trained(name, source, seed, options)
    count = QUICK_MINIBATCHES if options.quick else MINIBATCHES[name, source]
    batches = minibatches(source, SETTINGS[name, source].image_size, count, seed)
    graph = trace(model, batches[0].inputs[0][:2])
    saved = options.out / "cells" / f"correlation-oracle-{name}-{source}-{seed}-{count}.safetensors"
    start = time.perf_counter()
    changes = changes_of_loss(model, graph, batches, saved=saved, identity=f"{name} {source} {seed} {options.quick}")
    oracle_seconds = (time.perf_counter() - start) / count
    chosen = [criterion for criterion in CRITERIA if criterion not in LEFT_OUT.get((name, source), ())]
    importances, skipped = build_all(chosen, model, graph, skip_unscorable=True)
    scores, pass_seconds = score(model, importances, batches)
    saved.unlink(missing_ok=True)
    truth = reduce(changes, "squared").split(list(graph.widths.values()))
    return {
        "oracle": {group: part.tolist() for group, part in zip(graph.groups, truth, strict=True)},
        "criteria": {
            criterion: {group: values.tolist() for group, values in given.values.items()}
            for criterion, given in scores.items()
        },
        "residual": residual(graph),
        "seconds": {
            **{criterion: given.seconds for criterion, given in scores.items()},
            "oracle": oracle_seconds,
            "forward and backward": pass_seconds,
        },
        "skipped": skipped,
        "top1": evaluate(model, loaded.test).top1,
    }


def correlations(run: Run) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Criterion -> "all", "residual" or a group -> coefficient -> value, low and high."""
    truth = _tensors(run["oracle"])
    return {name: compare(_tensors(values), truth, run["residual"]) for name, values in run["criteria"].items()}


def coefficient(runs: Sequence[Mapping[str, Any]], criterion: str, part: str, kind: str = "spearman") -> np.ndarray:
    """One coefficient of one criterion, (seeds,)."""
    return np.array([found[criterion][part][kind]["value"] for found in runs], dtype=np.float64)


def findings(found: Mapping[tuple[Name, Source], Sequence[Any]], runs: Mapping[Any, Sequence[Run]]) -> list[Finding]:
    """What the coefficients say, means over seeds."""
    rows = []
    paper = "> 93 % correlation, on networks trained on ImageNet (abstract)"
    for network, each in found.items():
        title = _title(network)
        spearman, pearson = (coefficient(each, "taylor", ALL, kind) for kind in ("spearman", "pearson"))
        rows.append(
            Finding(
                f"First-order gates (`taylor`) agree with the oracle over all channels: {title}",
                paper,
                f"Spearman {spread(spearman, 3)}, Pearson {spread(pearson, 3)}",
                bool(spearman.mean() > 0.93),
            )
        )
    for network, each in found.items():
        if network[0] != "resnet20":
            continue
        title = _title(network)
        taylor = coefficient(each, "taylor", RESIDUAL)
        rows.append(
            Finding(
                f"The same over the residual streams alone: {title}",
                "no number that we know of",
                f"Spearman {spread(taylor, 3)}",
                None,
            )
        )
        rules = {rule: coefficient(each, rule, ALL) for rule in RULES}
        best = max(rules, key=lambda rule: rules[rule].mean())
        rows.append(
            Finding(
                f"The joint rule for a group's producers beats the others over all groups: {title}",
                "the authors' code uses one shared gate (`shared-gate`)",
                "; ".join(f"{_rule(rule)} {spread(values, 3)}" for rule, values in rules.items()),
                best == "taylor",
            )
        )
        lifted = []
        second_order = [name for name in ("taylor-so", "taylor-logits") if name in each[0]]
        for criterion in ("taylor-fg", *second_order):
            all_, streams = coefficient(each, criterion, ALL), coefficient(each, criterion, RESIDUAL)
            lifted.append(
                f"{criterion} {spread(streams, 3)} (all {spread(all_, 3)}) for {_cost(runs[network], criterion)}"
            )
        lifted.append(f"the oracle itself costs {_cost(runs[network], 'oracle')}")
        reached = max(coefficient(each, name, RESIDUAL).mean() for name in second_order)
        rows.append(
            Finding(
                f"What lifts the residual streams to 0.93: {title}",
                "no number that we know of",
                "; ".join(lifted),
                bool(reached >= 0.93),
            )
        )
        weights = [name for name in ("magnitude", "magnitude:norm=l1", "bn-scale") if name in each[0]]
        rows.append(
            Finding(
                f"Sizes of weights say little: {title}",
                "no number that we know of",
                "; ".join(f"{name} {spread(coefficient(each, name, ALL), 3)}" for name in weights),
                bool(max(coefficient(each, name, ALL).mean() for name in weights) < rules["taylor"].mean()),
            )
        )
    return rows


def _cost(runs: Sequence[Run], criterion: str) -> str:
    """Seconds of a criterion as a multiple of one forward and backward pass."""
    ratio = np.median([run["seconds"][criterion] / run["seconds"]["forward and backward"] for run in runs])
    return f"{ratio:.1f} passes" if ratio >= 0.1 else "less than 0.1 passes"


def _rule(criterion: str) -> str:
    return criterion.partition("combine=")[2] or "joint"


def _title(network: tuple[Name, Source]) -> str:
    return f"{TITLES[network[0]]}, {network[1]}"


def _tensors(values: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    return {group: torch.tensor(part, dtype=torch.float64) for group, part in values.items()}


def drawn(found: Mapping[tuple[Name, Source], Sequence[Any]]) -> Figure:
    """Spearman of every criterion: a dot for each seed, all groups and residual streams apart."""
    networks = [network for network in SHOWN if network in found]
    drawing, axes = figure(1, len(networks), width_in=2.4 + 2.3 * len(networks), height_in=6.2)
    ranked = sorted(CRITERIA, key=lambda name: _order(found[networks[0]], name))
    for panel, network in zip(axes.flat, networks, strict=True):
        for index, (part, label) in enumerate(((ALL, "all groups"), (RESIDUAL, "residual streams"))):
            points = [
                (each[name][part]["spearman"]["value"], row + 0.22 * (0.5 - index))
                for row, name in enumerate(ranked)
                for each in found[network]
                if name in each and part in each[name] and each[name][part]["spearman"]["value"] is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                panel.scatter(x, y, s=16, color=colour(index), marker="os"[index], linewidths=0, alpha=0.8, label=label)
        panel.axvline(0.93, color="#888888", linewidth=1, linestyle="--")
        panel.set(xlim=(-0.6, 1.05), yticks=range(len(ranked)), xlabel="Spearman", title=_title(network))
        panel.set_yticklabels(ranked if panel is axes.flat[0] else [])
    legend(drawing, axes.flat, columns=2)
    return drawing


def _order(runs: Sequence[Any], name: str) -> float:
    return float(coefficient(runs, name, ALL).mean()) if name in runs[0] else -2.0


def run(options: Options) -> None:
    """Measure every network and seed, then publish."""
    networks = [network for network in SHOWN if not options.quick or network[1] == "digits"]
    settings = {"criteria": CRITERIA, "minibatches": [[*key, value] for key, value in MINIBATCHES.items()]}
    cells = Cells(options, "correlation", settings)
    runs: dict[tuple[Name, Source], list[Run]] = {}
    for name, source in networks:
        for seed in range(1 if options.quick else SEEDS):
            cell = cells.get(f"{name}-{source}-{seed}", partial(measured, name, source, seed, options))
            runs.setdefault((name, source), []).append(cell)
    found = {network: [correlations(one) for one in each] for network, each in runs.items()}
    first = runs["resnet20", "digits"][0]
    values = {name: _tensors(given) for name, given in first["criteria"].items() if name in PANELS}
    skipped = {(_title(network), name) for network, each in runs.items() for one in each for name in one["skipped"]}
    publish(
        options,
        study="correlation",
        title="Criteria against the measured change of loss",
        question="How well does each criterion rank channels as their removal, one at a time, changes the loss? The "
        "oracle is the squared change on a minibatch of 64 images, averaged over minibatches.",
        findings=findings(found, runs),
        results={
            "correlations": {_title(network): each for network, each in found.items()},
            "runs": {
                _title(network): [{key: one[key] for key in ("top1", "residual", "seconds", "skipped")} for one in each]
                for network, each in runs.items()
            },
        },
        figures={"spearman": drawn(found), "scatter": scatter(values, _tensors(first["oracle"]), first["residual"])},
        notes=[
            f"Means over {len(runs['resnet20', 'digits'])} seeds, in brackets the smallest and the largest. Every "
            "coefficient with its bootstrap interval, per layer too, stands in the JSON file. A pass is one forward "
            "and backward pass of the same minibatch, measured in the same run.",
            "Cannot score a network: "
            + ("; ".join(f"{name} on {title}" for title, name in sorted(skipped)) or "none")
            + ". LeNet3 has no normalisation layer. Left out because they are too dear: "
            + "; ".join(f"{', '.join(names)} on {_title(network)}" for network, names in LEFT_OUT.items())
            + ".",
        ],
        seconds=cells.seconds,
    )


PANELS = ("taylor", "taylor-fg", "taylor-so", "taylor-logits", "taylor-output", "hessian", "bn-scale", "magnitude")
"""Criteria in the scatter plot."""


def main() -> None:
    run(options(__doc__))


if __name__ == "__main__":
    main()
