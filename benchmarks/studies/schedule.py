"""Pruning at once or in steps (Molchanov et al. 2019, figure 6): python -m benchmarks.studies.schedule --out DIR

All schedules see the same 64 minibatches and remove the same number of channels. Two regimes: (a) the weights stay as
they were trained, so that schedules differ in the ranking alone; (b) the network trains between the events.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import nn

from benchmarks.harness.figures import colour, figure, legend
from benchmarks.studies.networks import SETTINGS, TITLES, Name, spread, trained
from benchmarks.studies.schedule_runs import (
    AFTER,
    BETWEEN,
    FROZEN,
    ITERATIVE,
    MINIBATCHES,
    ONE_SHOT,
    REGIMES,
    Regime,
    Schedule,
    prune,
)
from benchmarks.studies.study import Cells, Finding, Options, options, publish
from compress.data import Data
from compress.graph import trace
from compress.training import evaluate

KEPT: dict[Name, float] = {"lenet3": 0.25, "resnet20": 0.6}
"""Fraction of the channels kept: chosen among a few so that the schedules differ; the curves show all widths before."""


class Runs:
    """The outcome of every network, regime, schedule and seed, each kept in one cell."""

    def __init__(self, cells: Cells, options: Options) -> None:
        self.seeds = range(1 if options.quick else 3)
        self.events = (1, 16, 64) if options.quick else (1, 2, 4, 8, 16, 32, 64)
        schedules = [ONE_SHOT, *(Schedule(n, m) for n in self.events[1:] for m in (0.0, 0.9)), FROZEN]
        network = cache(lambda name, seed: trained(name, "digits", seed, options))
        self.dense: dict[Name, list[dict[str, Any]]] = {name: [] for name in KEPT}
        self.pruned: dict[tuple[Name, Regime, Schedule], list[dict[str, Any]]] = {}

        def compute_dense(name: Name, seed: int) -> dict[str, Any]:
            return dense_state(*network(name, seed))

        def compute(name: Name, seed: int, regime: Regime, schedule: Schedule) -> dict[str, Any]:
            return prune(*network(name, seed), regime, schedule, KEPT[name], seed)

        for name, seed in product(KEPT, self.seeds):
            self.dense[name].append(cells.get(f"{name}-{seed}-dense", partial(compute_dense, name, seed)))
            for regime, schedule in product(REGIMES, schedules):
                key = f"{name}-{seed}-{regime}-{schedule.key}"
                run = cells.get(key, partial(compute, name, seed, regime, schedule))
                self.pruned.setdefault((name, regime, schedule), []).append(run)

    def with_momentum(self, momentum: float) -> list[Schedule]:
        """One schedule for every number of events."""
        return [ONE_SHOT, *(Schedule(events, momentum) for events in self.events[1:])]

    def values(self, name: Name, regime: Regime, schedule: Schedule, what: str, *, tuned: bool = False) -> np.ndarray:
        """`loss` or `top1` right after the last event, or after fine-tuning, (seeds,)."""
        runs = self.pruned[name, regime, schedule]
        return np.array([(run["tuned"] if tuned else run["curve"][-1])[what] for run in runs])

    def compare(self, regime: Regime, ours: Schedule, other: Schedule, *, tuned: bool = False) -> tuple[str, bool]:
        """Loss and accuracy of two schedules in words, and whether `ours` has the lower loss with every seed."""
        parts, clear = [], True
        for name, title in TITLES.items():
            loss, other_loss, top1, other_top1 = (
                self.values(name, regime, schedule, what, tuned=tuned)
                for what in ("loss", "top1")
                for schedule in (ours, other)
            )
            wins = int((loss < other_loss).sum())
            clear = clear and wins == len(self.seeds)
            parts.append(
                f"{title}: loss {spread(loss, 3)} against {spread(other_loss, 3)}, top-1 {spread(top1, 1)} % against "
                f"{spread(other_top1, 1)} %, the lower loss with {wins} of {len(self.seeds)} seeds"
            )
        return "; ".join(parts), clear

    def by_events(self, momentum: float) -> str:
        """Mean loss right after the last event for every number of events, in words."""
        parts = []
        for (name, title), (regime, label) in product(TITLES.items(), REGIMES.items()):
            losses = [self.values(name, regime, schedule, "loss").mean() for schedule in self.with_momentum(momentum)]
            best = self.events[int(np.argmin(losses))]
            parts.append(f"{title} {label[:3]} {', '.join(f'{loss:.3f}' for loss in losses)} (lowest at {best})")
        return "; ".join(parts)

    def frozen_is_one_shot(self) -> str:
        """In how many runs with fixed weights the frozen schedule left the same channels as one-shot pruning."""
        runs = [
            (frozen["kept"], once["kept"])
            for name in KEPT
            for frozen, once in zip(*(self.pruned[name, "fixed", s] for s in (FROZEN, ONE_SHOT)), strict=True)
        ]
        return f"{sum(frozen == once for frozen, once in runs)} of {len(runs)}"


def dense_state(model: nn.Module, loaded: Data) -> dict[str, Any]:
    """Removable channels, test loss and accuracy of the dense network."""
    graph = trace(model, torch.zeros(1, *loaded.image_shape))
    return {"channels": sum(graph.widths.values()), **asdict(evaluate(model, loaded.test))}


def findings(runs: Runs) -> list[Finding]:
    best = "figure 6: iterative pruning is clearly the best of the three"
    none = "no number to compare with"
    once, once_clear = runs.compare("fixed", ITERATIVE, ONE_SHOT)
    once_trained, once_trained_clear = runs.compare("trained", ITERATIVE, ONE_SHOT)
    stale, stale_clear = runs.compare("trained", ITERATIVE, FROZEN)
    steps = ITERATIVE.events
    events = ", ".join(map(str, runs.events))
    rows = [
        Finding(f"(a) Weights fixed: {steps} events leave a lower loss than one-shot pruning", best, once, once_clear),
        Finding(
            f"(b) Training between events: {steps} events leave a lower loss than one-shot pruning",
            best,
            once_trained,
            once_trained_clear,
        ),
        Finding(f"(b) {steps} events with new scores leave a lower loss than frozen ones", best, stale, stale_clear),
    ]
    tuned: list[tuple[Regime, Schedule]] = [("fixed", ONE_SHOT), ("trained", ONE_SHOT), ("trained", FROZEN)]
    for regime, other in tuned:
        measured, _ = runs.compare(regime, ITERATIVE, other, tuned=True)
        against = "frozen scores" if other.frozen else "one-shot pruning"
        rows.append(
            Finding(f"{REGIMES[regime][:3]} {steps} events against {against}, after fine-tuning", none, measured, None)
        )
    for regime, count in product(REGIMES, (steps, MINIBATCHES)):
        measured, _ = runs.compare(regime, Schedule(count, 0.9), Schedule(count, 0.0))
        claim = (
            f"{REGIMES[regime][:3]} Momentum 0.9 against 0, {count} events, {MINIBATCHES // count} minibatch(es) each"
        )
        rows.append(Finding(claim, "averages over events with 0.9; " + none, measured, None))
    rows += [
        Finding(f"Mean loss with {events} events, momentum {momentum:g}", none, runs.by_events(momentum), None)
        for momentum in (0.9, 0.0)
    ]
    return rows


def curves(runs: Runs) -> Figure:
    """Test loss over the channels kept, on the way down; mean over seeds and the range between them."""
    drawing, axes = figure(2, 2, width_in=9.0, height_in=6.6)
    named = {
        f"iterative, {ITERATIVE.events} events": ITERATIVE,
        "scores frozen; in (a) this is one-shot pruning to every width": FROZEN,
        "one-shot": ONE_SHOT,
    }
    for (row, regime), (column, name) in product(enumerate(REGIMES), enumerate(KEPT)):
        panel = axes[row, column]
        full = runs.dense[name][0]["channels"]
        for index, (label, schedule) in enumerate(named.items()):
            found = runs.pruned[name, regime, schedule]
            kept = [100 * point["channels"] / full for point in found[0]["curve"]]
            losses = np.array([[point["loss"] for point in run["curve"]] for run in found])  # (seeds, events)
            if schedule.events > 1:
                kept = [100.0, *kept]
                start = np.array([[dense["loss"]] for dense in runs.dense[name]])
                losses = np.concatenate([start, losses], axis=1)
            _line(panel, kept, losses, index, label, marker="s" if schedule is ONE_SHOT else "o")
        panel.invert_xaxis()
        panel.set(title=f"{TITLES[name]}, {REGIMES[regime]}", xlabel="channels kept, %" if row else None)
        _loss_axis(panel, labelled=column == 0)
    legend(drawing, axes.flat, columns=3)
    return drawing


def events_figure(runs: Runs) -> Figure:
    """Test loss over the number of events, right after pruning and after fine-tuning."""
    drawing, axes = figure(2, 2, width_in=9.0, height_in=6.6)
    for (row, tuned), (column, name) in product(enumerate((False, True)), enumerate(KEPT)):
        panel = axes[row, column]
        for index, (regime, momentum) in enumerate(product(REGIMES, (0.0, 0.9))):
            schedules = runs.with_momentum(momentum)
            losses = np.stack([runs.values(name, regime, one, "loss", tuned=tuned) for one in schedules], axis=1)
            _line(panel, list(runs.events), losses, index, f"{REGIMES[regime]}, momentum {momentum:g}")
        moment = "after fine-tuning" if tuned else "right after pruning"
        panel.set(title=f"{TITLES[name]}, {moment}", xlabel="pruning events" if row else None)
        panel.set_xscale("log", base=2)
        panel.set_xticks(runs.events, [str(count) for count in runs.events])
        _loss_axis(panel, labelled=column == 0)
    legend(drawing, axes.flat, columns=2)
    return drawing


def _loss_axis(panel: Axes, *, labelled: bool) -> None:
    """A logarithmic axis with the numbers 1, 2 and 5 of every decade written out."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    if labelled:
        panel.set_ylabel("test loss, nats")


def _line(panel: Axes, x: Sequence[float], y: np.ndarray, index: int, label: str, marker: str = "o") -> None:
    """Mean of y (seeds, x) with a band from the smallest to the largest value."""
    panel.plot(x, y.mean(axis=0), marker=marker, markersize=4 if len(x) > 1 else 8, color=colour(index), label=label)
    panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour(index), alpha=0.15, linewidth=0)
    if len(x) == 1:
        panel.vlines(x, y.min(axis=0), y.max(axis=0), color=colour(index))


def run(options: Options) -> None:
    """Compute what is missing and publish the page."""
    settings = {
        "networks": {name: asdict(SETTINGS[name, "digits"]) for name in KEPT},
        "kept": KEPT,
        "minibatches": MINIBATCHES,
        "between": BETWEEN.model_dump(mode="json"),
        "after": AFTER.model_dump(mode="json"),
    }
    cells = Cells(options, "schedule", settings)
    runs = Runs(cells, options)
    pruned = [
        {"network": name, "regime": regime, "schedule": schedule.key, "seed": seed, **found}
        for (name, regime, schedule), several in runs.pruned.items()
        for seed, found in zip(runs.seeds, several, strict=True)
    ]
    kept = "; ".join(f"{TITLES[name]} {100 * fraction:.0f} % of the channels" for name, fraction in KEPT.items())
    dense = "; ".join(
        f"{title} top-1 {spread(np.array([one['top1'] for one in runs.dense[name]]), 1)} %, "
        f"loss {spread(np.array([one['loss'] for one in runs.dense[name]]), 3)}"
        for name, title in TITLES.items()
    )
    publish(
        options,
        study="schedule",
        title="Pruning at once or in steps",
        question="Molchanov et al. 2019 (arXiv 1906.10771), figure 6: does it pay to prune in many small events with "
        "new scores at each, and how many events does it take?",
        findings=findings(runs),
        results={"settings": settings, "dense": runs.dense, "pruned": pruned},
        figures={"curves": curves(runs), "events": events_figure(runs)},
        notes=(
            f"Handwritten digits, 360 test images; {len(runs.seeds)} seed(s). Numbers are means over seeds, with the "
            f"smallest and the largest in brackets; loss in nats. Dense networks: {dense}. Kept: {kept}; chosen "
            "among a few widths so that the schedules differ, with the curves to show all that come before.",
            f"Every schedule sees the same {MINIBATCHES} minibatches of 64 images and ends at the same number of "
            "channels, so more events means fewer minibatches for each ranking. In (a) the learning rate is 0 and the "
            "network runs in evaluation mode; in (b) SGD with learning rate 0.01 trains it after every minibatch. "
            f"Fine-tuning is {AFTER.epochs} epochs. A finding agrees where the loss is lower with every seed of both "
            "networks.",
            "Frozen scores are taken once, on the dense network over all the minibatches, and the channels go in that "
            "order. With fixed weights this is one-shot pruning by construction (the same channels were left in "
            f"{runs.frozen_is_one_shot()} runs), and its curve is one-shot pruning at every width. With training in "
            "between it is not, and tells how much of the gain is due to training alone.",
            "The paper's text could not be read where this was written: what it says is given from memory. Its figure "
            "is of other networks and data (CIFAR-10, ImageNet); only the order of the schedules is compared.",
        ),
        seconds=cells.seconds,
    )


def main() -> None:
    run(options(__doc__))


if __name__ == "__main__":
    main()
