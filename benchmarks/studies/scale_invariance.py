"""Same function, other magnitudes: python -m benchmarks.studies.scale_invariance --out DIR [--quick]

Li et al. 2020 (arXiv 2006.10903): scaling one layer of a ReLU network up and the next down keeps the function and every
weight's natural importance, and moves the magnitudes at will; and a network trained from such a start ends with
layers that are small and important, which magnitude pruning removes. Scikit-learn's digits, 64 pixels, 10 classes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.studies.scale_experiment import (
    EPOCHS,
    LAMBDAS,
    LEARNING_RATE,
    QUOTED,
    SPARSITIES,
    SUBSET,
    SUBSET_DRAWS,
    UNITS,
    rescale,
    train_scaled,
)
from benchmarks.studies.scale_figures import rescaled_figure, trained_figure, training_figure
from benchmarks.studies.study import Cells, Finding, Options, options, publish
from benchmarks.studies.two_layer import CRITERIA, MINIBATCH

_QUOTED = f"{100 * SPARSITIES[QUOTED]:.0f} %"


def main() -> None:
    run(options(__doc__))


def run(options: Options) -> None:
    """Rescale trained networks, and train rescaled ones, for every seed and λ."""
    seeds = 1 if options.quick else 5
    settings = {
        "units": UNITS,
        "learning_rate": LEARNING_RATE,
        "epochs": EPOCHS,
        "minibatch": MINIBATCH,
        "lambdas": LAMBDAS,
        "sparsities": SPARSITIES,
        "subset": SUBSET,
        "subset_draws": SUBSET_DRAWS,
    }
    cells = Cells(options, "scale_invariance", settings)
    rescaled = [cells.get(f"rescaled seed={seed}", partial(rescale, seed)) for seed in range(seeds)]
    trained = {
        f"{scale:g}": [
            cells.get(f"trained lambda={scale:g} seed={seed}", partial(train_scaled, scale, seed))
            for seed in range(seeds)
        ]
        for scale in LAMBDAS
    }
    publish(
        options,
        study="scale_invariance",
        title="Same function, other magnitudes",
        question="In a ReLU network V relu(Wx), W is multiplied by λ and V divided by it: which criteria notice, "
        "though the function is the same? And what does training from such a start do to magnitude pruning? (Li et "
        "al. 2020, arXiv 2006.10903)",
        findings=[*rescaled_findings(rescaled), *trained_findings(trained)],
        results={"settings": {**settings, "seeds": seeds}, "rescaled": rescaled, "trained": trained},
        figures={
            "rescaled": rescaled_figure(rescaled),
            "training": training_figure(trained),
            "trained": trained_figure(trained),
        },
        notes=[
            f"64 - {UNITS} - 10 without biases, SGD with learning rate {LEARNING_RATE} for every λ, minibatches of "
            f"{MINIBATCH}, {EPOCHS} epochs, number of seeds {seeds}, no training after pruning. Scores and losses on "
            "the 1,437 training examples, accuracy on the 360 test examples (one example is 0.28 %). Weights of both "
            "layers are ranked together.",
            "Criteria for a weight: magnitude w²; Hessian H_ii w² with the exact diagonal; Taylor (w ∂E/∂w)² per "
            "minibatch, averaged; natural, the absolute change of the loss over all training examples when the weight "
            "alone is zeroed; oracle, the square of that change per minibatch, averaged. For a unit: the sum over "
            "its weights (magnitude, Hessian) or its gate (the others).",
            f"Importance of a layer: change of the training loss when a random {100 * SUBSET:.0f} % of its weights is "
            f"zeroed, mean of {SUBSET_DRAWS} draws. Bands in the figures are the extremes over seeds.",
        ],
        seconds=cells.seconds,
    )


def rescaled_findings(rescaled: Sequence[Mapping[str, Any]]) -> list[Finding]:
    logits, importance = (
        max(cell[key] for seed in rescaled for cell in seed.values()) for key in ("logits_change", "natural_change")
    )
    invariant = [name for name in CRITERIA if name != "magnitude"]
    spread = {name: _largest_spread(rescaled, name) for name in CRITERIA}
    at_scale = [
        _percent([seed[f"{scale:g}"]["weights"]["magnitude"][QUOTED] for seed in rescaled]) for scale in LAMBDAS
    ]
    same = {name: _percent([seed["1"]["weights"][name][QUOTED] for seed in rescaled]) for name in invariant}
    natural, oracle = (
        [_percent([seed["1"]["weights"][name][at] for seed in rescaled]) for at in (SPARSITIES.index(0.5), QUOTED)]
        for name in ("natural", "oracle")
    )
    lambdas = ", ".join(f"{scale:g}" for scale in LAMBDAS)
    return [
        Finding(
            "(λW, V/λ) keeps the function and the natural importance of every weight",
            "exactly",
            f"largest change over λ = {lambdas}, relative to the largest value: logits {logits:.0e}, natural "
            f"importance {importance:.0e}",
            max(logits, importance) < 1e-10,
        ),
        Finding(
            "Every criterion but magnitude prunes the same for every λ, weights and units",
            "Hessian-based importance follows natural importance",
            "largest change of test accuracy over λ at any sparsity: "
            + ", ".join(f"{name} {100 * spread[name]:.1f} points" for name in invariant),
            all(spread[name] < 0.01 for name in invariant),
        ),
        Finding(
            "Magnitude pruning depends on λ",
            "magnitude can be at odds with importance",
            f"test accuracy at {_QUOTED} sparsity of weights for λ = {lambdas}: magnitude "
            f"{', '.join(at_scale)}; every λ: {', '.join(f'{name} {value}' for name, value in same.items())}",
            spread["magnitude"] > 0.1,
        ),
        Finding(
            "The measured change of the loss as a rank of single weights",
            "—",
            "test accuracy at 50 % and at "
            f"{_QUOTED} sparsity: natural (change over all examples) {natural[0]} and {natural[1]}, oracle (squared "
            f"per minibatch) {oracle[0]} and {oracle[1]}",
            None,
        ),
    ]


def trained_findings(trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    ends = {
        scale: {key: np.mean([seed[key][-1] for seed in seeds], axis=0) for key in ("magnitude", "importance")}
        for scale, seeds in trained.items()
    }
    small = {"0.1": (0, "W"), "10": (1, "V")}  # the layer that starts small
    ratios = {
        scale: [ends[scale][key][layer] / ends["1"][key][layer] for key in ("magnitude", "importance")]
        for scale, (layer, _) in small.items()
    }
    across = "; ".join(
        f"{name} at λ = {scale} against λ = 1: mean |w| × {ratios[scale][0]:.2f}, importance × {ratios[scale][1]:.2f}"
        for scale, (_, name) in small.items()
    )
    opposite = []
    for scale, seeds in trained.items():
        for layer, name in enumerate("WV"):
            sizes, values = (
                np.mean([seed[key] for seed in seeds], axis=0)[:, layer] for key in ("magnitude", "importance")
            )
            # From the end of the first epoch: at the start the layers do nothing yet, and importance can only grow.
            if sizes[-1] < 0.99 * sizes[1] and values[-1] > values[1]:
                opposite.append(f"{name} at λ = {scale}")
    pruned = {
        scale: {name: [seed["weights"][name][QUOTED] for seed in seeds] for name in CRITERIA}
        for scale, seeds in trained.items()
    }
    accuracies = "; ".join(
        f"λ = {scale}: dense {_percent([seed['weights']['magnitude'][0] for seed in trained[scale]])}, "
        + ", ".join(f"{name} {_percent(values)}" for name, values in by_name.items())
        for scale, by_name in pruned.items()
    )
    kept = {name: np.mean([seed["output_layer_kept"][name] for seed in trained["10"]]) for name in CRITERIA}
    return [
        Finding(
            "After training from a scaled start, a layer can be smaller and more important",
            "weights become more important despite becoming smaller",
            across,
            any(size < 1 < value for size, value in ratios.values()),
        ),
        Finding(
            "Within one training run, from the end of the first epoch, a layer becomes smaller (by over 1 %) and more "
            "important",
            "weights become more important despite becoming smaller",
            f"of {2 * len(trained)} pairs (layer, λ): {', '.join(opposite) or 'none'}",
            bool(opposite),
        ),
        Finding(
            "Magnitude pruning then fails",
            "catastrophic failure of magnitude-based pruning; initialisation is critical",
            f"test accuracy at {_QUOTED} sparsity, {accuracies}",
            float(np.mean(pruned["10"]["magnitude"])) < 0.5 < float(np.mean(pruned["10"]["hessian"])),
        ),
        Finding(
            "What is left of the layer that started small",
            "—",
            f"share of V kept at {_QUOTED} sparsity, λ = 10: "
            + ", ".join(f"{name} {100 * share:.1f} %" for name, share in kept.items()),
            None,
        ),
    ]


def _largest_spread(rescaled: Sequence[Mapping[str, Any]], criterion: str) -> float:
    """The largest change of accuracy over λ, at any sparsity, for weights and units."""
    curves = np.array(
        [[[cell[kind][criterion] for cell in seed.values()] for kind in ("weights", "units")] for seed in rescaled]
    )  # (seeds, 2, λ, sparsities)
    return float(np.ptp(curves, axis=2).max())


def _percent(values: Sequence[float]) -> str:
    """Mean over seeds, with the extremes where there is more than one."""
    text = f"{100 * np.mean(values):.1f} %"
    return text if len(values) == 1 else f"{text} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


if __name__ == "__main__":
    main()
