"""Risk of a pruned linear model, in theory and in simulation: python -m benchmarks.studies.linear_model --out DIR

Li et al. 2020 (arXiv 2006.10903): the natural importance of a linear model's weight is its square times the
variance of its feature, which is Hessian-based importance; magnitude ignores the variance. The theory is in
`linear_theory`; here finite models are fitted, pruned without refitting, and their exact risk compared with it.
"""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.linalg import solve
from scipy.stats import norm, qmc

from benchmarks.harness import figures
from benchmarks.studies.linear_theory import CRITERIA, Array, excess_of_fit, limit, lognormal, risk
from benchmarks.studies.study import Cells, Finding, Options, options, publish

SIGMA = 0.5
SPREAD = 1.2
KAPPAS = (0.2, 0.5, 0.7, 1.5, 2.0, 3.0, 5.0, 10.0)
KEPT = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
MARKERS = {"magnitude": "o", "hessian": "s", "oracle": "^"}


def main() -> None:
    run(options(__doc__))


def run(options: Options) -> None:
    """Simulate over κ and s, compare with the theory, search the theory for where the criteria change places."""
    features, repetitions = (512, 150) if options.quick else (1024, 200)
    settings = {"features": features, "repetitions": repetitions, "sigma": SIGMA, "spread": SPREAD, "kept": KEPT}
    cells = Cells(options, "linear_model", settings)
    grid = {kappa: cells.get(f"kappa={kappa:g}", partial(compare, kappa, features, repetitions)) for kappa in KAPPAS}
    wide = cells.get("wide", partial(wide_grid, options.quick))
    publish(
        options,
        study="linear_model",
        title="Risk of a pruned linear model",
        question="A linear model is fitted and its weights are pruned without refitting: how much risk does each "
        "criterion cost, and do the asymptotic formulas predict what finite models show? (Li et al. 2020, arXiv "
        "2006.10903)",
        findings=findings(grid, wide),
        results={"settings": settings, "grid": {f"{kappa:g}": cell for kappa, cell in grid.items()}, "wide": wide},
        figures={"risk": risk_figure(grid), "kappa": kappa_figure()},
        notes=[
            f"Features are N(0, diag(Λ)) with Λ lognormal, log-deviation {SPREAD}, mean 1; coefficients β = B/√p, "
            f"B ~ N(0, 1); noise σ = {SIGMA}. Simulation: p = {features}, {repetitions} repetitions. Every repetition "
            "draws design and noise anew and takes (Λ, B) from a freshly scrambled Sobol set: with independent draws "
            "the luck of the largest Λ would swamp the comparison. The risk of every fitted model is exact, from Λ "
            "and β.",
            "The oracle ranks by √Λ |B|, the true importance, but prunes the fitted model: it is no lower bound.",
        ],
        seconds=cells.seconds,
    )


def compare(kappa: float, features: int, repetitions: int) -> dict[str, Any]:
    """Theory, simulated mean and its standard error for every criterion, in the order of `KEPT`."""
    fitted = limit(lognormal(SPREAD), kappa, SIGMA)
    simulated = np.stack([simulate(kappa, features, seed) for seed in range(repetitions)])  # (repetitions, criteria, s)
    means, errors = simulated.mean(0), simulated.std(0, ddof=1) / np.sqrt(repetitions)
    return {
        criterion: {
            "theory": [risk(fitted, kept, criterion) for kept in KEPT],
            "simulated": means[row].tolist(),
            "standard_error": errors[row].tolist(),
        }
        for row, criterion in enumerate(CRITERIA)
    }


def simulate(kappa: float, features: int, seed: int) -> Array:
    """Exact risk of one fitted and pruned model, (criteria, s) in the orders of `CRITERIA` and `KEPT`."""
    rng = np.random.default_rng(seed)
    points = norm.ppf(qmc.Sobol(2, rng=rng).random(features))  # (p, 2)
    variances = np.exp(SPREAD * points[:, 0] - SPREAD**2 / 2)
    true = points[:, 1]
    x = rng.standard_normal((round(features / kappa), features)) * np.sqrt(variances)
    y = x @ true / np.sqrt(features) + SIGMA * rng.standard_normal(len(x))
    fitted = fit(x, y) * np.sqrt(features)
    scores = {
        "magnitude": np.abs(fitted),
        "hessian": np.sqrt(variances) * np.abs(fitted),
        "oracle": np.sqrt(variances) * np.abs(true),
    }
    risks = np.empty((len(CRITERIA), len(KEPT)))
    for row, criterion in enumerate(CRITERIA):
        order = np.argsort(-scores[criterion])
        for column, kept in enumerate(KEPT):
            pruned = np.zeros(features)
            chosen = order[: round(kept * features)]
            pruned[chosen] = fitted[chosen]
            risks[row, column] = SIGMA**2 + np.mean(variances * (true - pruned) ** 2)
    return risks


def fit(x: Array, y: Array) -> Array:
    """Least squares where (n, p) has n > p, the solution of least norm where n < p."""
    if x.shape[0] > x.shape[1]:
        return solve(x.T @ x, x.T @ y, assume_a="pos")
    return x.T @ solve(x @ x.T, y, assume_a="pos")


def wide_grid(quick: bool) -> list[dict[str, float]]:
    """Theory far beyond what is simulated: how much higher the risk after magnitude pruning is than after Hessian."""
    spreads = (0.3, 1.2, 2.0) if quick else (0.1, 0.3, 0.6, 1.2, 2.0, 3.0)
    kappas = (0.05, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30)
    rows = []
    for spread, kappa, sigma in product(spreads, kappas, (0, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 5)):
        fitted = limit(lognormal(spread), kappa, sigma)
        advantages = [
            risk(fitted, kept, "magnitude") / risk(fitted, kept, "hessian") - 1
            for kept in (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
        ]
        rows.append(
            {
                "spread": spread,
                "kappa": kappa,
                "sigma": sigma,
                "excess_of_fit": excess_of_fit(fitted),
                "least_advantage": min(advantages),
                "most_advantage": max(advantages),
            }
        )
    return rows


def findings(grid: Mapping[float, Any], wide: list[dict[str, float]]) -> list[Finding]:
    gaps = [
        (abs(simulated / theory - 1), error / theory, kappa, kept, criterion)
        for kappa, cell in grid.items()
        for criterion, curves in cell.items()
        for theory, simulated, error, kept in zip(
            curves["theory"], curves["simulated"], curves["standard_error"], KEPT, strict=True
        )
    ]
    gap, error, kappa, kept, criterion = max(gaps)
    advantages = [
        (magnitude / hessian - 1, kappa, kept)
        for kappa, cell in grid.items()
        for magnitude, hessian, kept in zip(cell["magnitude"]["theory"], cell["hessian"]["theory"], KEPT, strict=True)
    ]
    best, worst = max(advantages), min(advantages)
    useful = [row for row in wide if row["excess_of_fit"] < 0.9]
    between = [row for row in wide if 0.9 <= row["excess_of_fit"] <= 1]
    loss_between = max(0.0, -min(row["least_advantage"] for row in between))
    useless = [row for row in wide if row["excess_of_fit"] > 1]
    rounding = -1e-9
    reversed_ = [row for row in useless if row["least_advantage"] < rounding]
    lowest = min(row["least_advantage"] for row in wide)
    return [
        Finding(
            "Asymptotic formulas give the risk of finite pruned models",
            "theory and simulation coincide",
            f"largest relative gap over {len(gaps)} cells ({len(KAPPAS)} κ, {len(KEPT)} s, {len(CRITERIA)} criteria): "
            f"{100 * gap:.2f} %, standard error {100 * error:.2f} % (κ = {kappa:g}, s = {kept:g}, {criterion}); "
            f"median {100 * np.median([row[0] for row in gaps]):.2f} %; within 2 % asked",
            gap <= 0.02,
        ),
        Finding(
            "Hessian-based pruning is never worse than magnitude on the simulated grid (theory)",
            "scaling by the covariance is the natural importance",
            f"risk after magnitude is {100 * worst[0]:.1f} % to {100 * best[0]:.1f} % above that after Hessian "
            f"(most at κ = {best[1]:g}, s = {best[2]:g})",
            worst[0] >= rounding,
        ),
        Finding(
            "The same in theory over wide ranges of κ, σ, s and spread, where the fit is of use: its excess risk is "
            "below 0.9 of that of predicting 0",
            "as above",
            f"Hessian worse in {sum(row['least_advantage'] < rounding for row in useful)} of {len(useful)} settings; "
            f"in the {len(between)} between 0.9 and 1, by at most {100 * loss_between:.4f} %",
            all(row["least_advantage"] >= rounding for row in useful),
        ),
        Finding(
            "Where the fit is worse than predicting 0 (much noise, κ near 1)",
            "—",
            f"Hessian worse at some s in {len(reversed_)} of {len(useless)} settings; at worst the risk "
            f"after magnitude is {-100 * lowest:.0f} % lower",
            None,
        ),
    ]


def risk_figure(grid: Mapping[float, Any]) -> Figure:
    """Risk over the share kept, one panel for each of four κ: lines are theory, marks are simulation."""
    drawing, axes = figures.figure(1, 4, width_in=11, height_in=3.6)
    theory_kept = np.geomspace(0.02, 1, 60)
    for panel, kappa in zip(axes.flat, (0.2, 0.7, 2.0, 10.0), strict=True):
        fitted = limit(lognormal(SPREAD), kappa, SIGMA)
        for index, criterion in enumerate(CRITERIA):
            panel.plot(
                theory_kept,
                [risk(fitted, kept, criterion) for kept in theory_kept],
                color=figures.colour(index),
                label=f"{criterion}, theory",
            )
            panel.plot(
                KEPT,
                grid[kappa][criterion]["simulated"],
                MARKERS[criterion],
                color=figures.colour(index),
                markersize=5,
                label=f"{criterion}, simulated",
            )
        panel.set_title(f"κ = p/n = {kappa:g}")
        panel.set_xlabel("share of weights kept")
    axes[0, 0].set_ylabel("risk (squared error)")
    figures.legend(drawing, axes.flat, columns=3)
    return drawing


def kappa_figure() -> Figure:
    """How much more magnitude costs than Hessian over κ: by noise at one spread, by spread at one noise (theory)."""
    drawing, axes = figures.figure(1, 2, width_in=10, height_in=3.8)
    below, above = np.linspace(0.05, 0.97, 60), np.geomspace(1.03, 20, 80)
    kappas = np.concatenate([below, [np.nan], above])  # the gap breaks the line at κ = 1, where both risks are infinite

    def advantage(spread: float, sigma: float) -> list[float]:
        fits = [None if np.isnan(kappa) else limit(lognormal(spread), kappa, sigma) for kappa in kappas]
        return [
            np.nan if fit is None else 100 * (risk(fit, 0.3, "magnitude") / risk(fit, 0.3, "hessian") - 1)
            for fit in fits
        ]

    for index, sigma in enumerate((0.0, 0.25, 0.5, 1.0)):
        axes[0, 0].plot(kappas, advantage(SPREAD, sigma), color=figures.colour(index), label=f"σ = {sigma:g}")
    for index, spread in enumerate((0.3, 0.6, 1.2, 2.0)):
        axes[0, 1].plot(kappas, advantage(spread, SIGMA), color=figures.colour(index), label=f"spread {spread:g}")
    axes[0, 0].set_title(f"by noise (spread of log Λ: {SPREAD:g})")
    axes[0, 1].set_title(f"by spread of log Λ (σ = {SIGMA:g})")
    for panel in axes.flat:
        panel.set_xscale("log")
        panel.axhline(0, color="#000000", linewidth=1)
        panel.set_xlabel("κ = p/n")
        panel.legend(loc="best", frameon=False)
    axes[0, 0].set_ylabel("risk of magnitude over Hessian, %\n(30 % kept)")
    return drawing


if __name__ == "__main__":
    main()
