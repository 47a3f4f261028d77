"""The last stage: the outcomes of all stages brought together in `results.json`, a table, a page and figures."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.figure_files import write_figures
from benchmarks.harness.report import report_html
from benchmarks.harness.results import (
    Accuracy,
    Artefact,
    BudgetResult,
    LayerWidths,
    Pruning,
    PruningEvent,
    Results,
    Runtime,
    VariantResult,
    csv_text,
)
from compress.checkpoint import Architecture
from compress.errors import WorkError
from compress.files import write_text
from deploy.manifest import tool_versions
from deploy.run_directory import RunDirectory
from deploy.stages import TRAININGS, VARIANTS, Deployed, Run, percent_key, seeds

Outcomes = Mapping[str, Mapping[str, Any]]
NEEDED = (*TRAININGS, "export", "engine", "parity", "measure")


def report(run: Run) -> dict[str, Any]:
    """Write the three documents; `results.json` comes last, for a run that has it is complete.

    Raises:
        WorkError: a stage before this one is not finished.
    """
    outcomes: dict[str, Mapping[str, Any]] = {}
    for stage in NEEDED:
        outcome = run.directory.outcome(stage)
        if outcome is None:
            raise WorkError(f"There is nothing to report yet: the stage {stage} is not finished.")
        outcomes[stage] = outcome
    results = assemble(run, outcomes)
    render(run.directory, results)
    write_text(run.directory.results, results.to_json())
    return {}


def render(directory: RunDirectory, results: Results) -> None:
    """Write what follows from the results alone: the table, the figures and the page."""
    write_text(directory.results_csv, csv_text(results))
    write_figures(results, directory.figures)
    write_text(directory.report, report_html(results))


def assemble(run: Run, outcomes: Outcomes) -> Results:
    """The results document of a run from what its stages recorded."""
    return Results(
        created=datetime.now(UTC),
        recipe=run.recipe.resolved(),
        seeds={"recipe": run.recipe.seed, **seeds(run.recipe)},
        environment=outcomes["measure"]["environment"],
        variants=[_variant(run, deployed, outcomes) for deployed in run.deployed],
        pruning=_pruning(outcomes),
        explanations=outcomes["measure"]["explanations"],
        not_measured={
            "server": "espalier run times queries one after the other; ask with espalier bench --scenario Server.",
            "throughput": "espalier run has one query at a time; ask with espalier bench --streams 1,2,4.",
            **({} if run.recipe.measure.layers else {"layers": "measure.layers is false in the recipe."}),
        },
        training={stage: outcomes[stage]["training"] for stage in TRAININGS},
        provenance={
            "command": "espalier run recipe.yaml",
            "versions": dict(tool_versions()),
            "checkpoints": {variant: Architecture.read(run.checkpoint(variant)).sha256 for variant in VARIANTS},
            "runtime": str(run.serving),
            "stage_seconds": {stage: outcome["seconds"] for stage, outcome in outcomes.items()},
        },
    )


def _variant(run: Run, deployed: Deployed, outcomes: Outcomes) -> VariantResult:
    entries = {**outcomes["export"]["entries"], **outcomes["engine"]["entries"]}
    entry = entries[deployed.file.name]
    checked = outcomes["parity"][deployed.label]
    runtime, accuracy = outcomes["measure"]["runtimes"][deployed.label], checked["accuracy"]
    counts = outcomes["measure"]["counts"][deployed.variant]
    in_pytorch = outcomes["baseline" if deployed.variant == "dense" else "finetune"]["pytorch"]
    return VariantResult(
        name=deployed.label,
        kind=deployed.variant,
        artefact=Artefact(
            path=str(deployed.file.relative_to(run.directory.root)),
            sha256=entry["sha256"],
            size_bytes=entry["size_bytes"],
            precision=entry["precision"],
        ),
        runtime=Runtime(
            name=runtime["runtime"], version=runtime["version"], device=runtime["device"], proof=dict(runtime)
        ),
        parameters=counts["parameters"],
        macs=counts["macs"],
        accuracy=Accuracy.of(
            top1_percent=accuracy["top1"],
            top5_percent=accuracy["top5"] if len(run.data.classes) > 5 else None,
            loss=accuracy["loss"],
            samples=accuracy["samples"],
            metric=accuracy["metric"],
            others_percent=accuracy["others"],
        ),
        parity={
            "reference": "the checkpoint in PyTorch",
            f"reference_{percent_key(in_pytorch['metric'])}": in_pytorch["top1"],
            "reference_loss": in_pytorch["loss"],
            "max_relative_error": checked["max_relative_error"],
            "mean_relative_error": checked["mean_relative_error"],
            "rms_relative_error": checked["rms_relative_error"],
            "top1_agreement_percent": checked["top1_agreement"],
            "tolerance": checked["tolerance"],
            "batches": checked["batches"],
        },
        measurements=[
            BatchMeasurement.model_validate(item) for item in outcomes["measure"]["measurements"][deployed.label]
        ],
        rooflines=outcomes["measure"]["rooflines"][deployed.label],
    )


def _pruning(outcomes: Outcomes) -> Pruning:
    before, after = (outcomes["measure"]["counts"][variant]["widths"] for variant in VARIANTS)
    return Pruning(
        budget=BudgetResult(**outcomes["prune"]["budget"]),
        layers=[LayerWidths(name=name, width_before=width, width_after=after[name]) for name, width in before.items()],
        events=[PruningEvent(**event) for event in outcomes["prune"]["events"]],
    )
