"""The command `espalier`: the workflow and what explains it. What makes files is in `cli_deploy`, what
measures them in `cli_measure`.

Heavy imports stand inside the commands, so that --help and usage errors come at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import deploy.cli_deploy
import deploy.cli_measure  # noqa: F401
from deploy.cli_app import DataSource, Debug, Json, Trust, app
from deploy.console import command, emit, show

if TYPE_CHECKING:
    from deploy.recipe import Recipe

RUNS = Path("runs")

RecipePath = Annotated[
    Path | None, typer.Argument(metavar="RECIPE.yaml", help="What to do; the built-in recipe if not given.")
]
Out = Annotated[Path | None, typer.Option(help="Run directory.  \\[default: runs/NAME of the recipe]", metavar="DIR")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as prune.events=5; repeatable."),
]


@app.command()
def run(
    recipe: RecipePath = None,
    out: Out = None,
    changes: Set = None,
    dump_recipe: Annotated[
        bool, typer.Option("--dump-recipe", help="Print the recipe with every key; run nothing.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train or take a network, prune it, fine-tune, export, verify, measure and report.

    Killed at any moment, the same command goes on where it was.
    """
    with command(debug=debug, advice="the same command goes on where it stopped."):
        chosen = _recipe(recipe, changes)
        if dump_recipe:
            from deploy.recipe_text import dump

            emit(dump(chosen))
            return
        directory = out or RUNS / chosen.name

        from benchmarks.harness.report import compared, headline
        from benchmarks.harness.tables import summary
        from deploy import pipeline

        results = pipeline.run(chosen, directory)
        if json:
            emit(results.to_json())
        else:
            show(summary(results), headline(results, compared(results)), f"Report: {directory / 'report.html'}")


@app.command()
def prune(
    recipe: RecipePath = None, out: Out = None, changes: Set = None, json: Json = False, debug: Debug = False
) -> None:
    """Run a recipe up to the checkpoint of the pruned network; `run` goes on from there."""
    with command(debug=debug, advice="the same command goes on where it stopped."):
        chosen = _recipe(recipe, changes)

        from deploy import inspection, pipeline

        directory = pipeline.prune(chosen, out or RUNS / chosen.name)
        found = inspection.inspect(directory.pruned)
        if json:
            emit(found)
        else:
            show(*inspection.tables(found), f"Checkpoint: {directory.pruned}")


@app.command()
def correlate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.", metavar="CHECKPOINT")],
    data: DataSource,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="Criteria, NAME or NAME:option=value, with commas between.  \\[default: all that fit the network and "
            "cost less than the oracle]",
            metavar="A,B,C",
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Minibatches on which everything is measured.")] = 16,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a minibatch.")] = 64,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels.  \\[default: the checkpoint's]")
    ] = None,
    reduction: Annotated[
        str, typer.Option(help="The oracle's average over minibatches: squared, absolute or signed change of loss.")
    ] = "squared",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images and of the bootstrap.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write.  \\[default: correlation beside the checkpoint]", metavar="DIR"),
    ] = None,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold importance criteria against the measured change of loss, on your own network and data."""
    with command(debug=debug, advice="the same command goes on where it stopped."):
        from typing import get_args

        from compress.errors import InputError
        from compress.importance.oracle import Reduction
        from deploy import correlating, correlation_views

        if reduction not in get_args(Reduction):
            raise InputError(f"--reduction is {reduction!r}, but must be one of {', '.join(get_args(Reduction))}.")
        names = None if criteria is None else [name.strip() for name in criteria.split(",") if name.strip()]
        found = correlating.correlate(
            checkpoint,
            data,
            names=names,
            batches=batches,
            batch_size=batch_size,
            image_size=image_size,
            reduction=reduction,  # type: ignore[arg-type]  # checked above
            seed=seed,
            out=out,
            trust=trust or (),
        )
        if json:
            emit(found)
        else:
            show(*correlation_views.tables(found), f"Scatter plot and all numbers: {found['directory']}")


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN_DIR")], debug: Debug = False
) -> None:
    """Render report.html, results.csv and the figures again from results.json."""
    with command(debug=debug):
        from benchmarks.harness.results import load
        from deploy.documents import render
        from deploy.run_directory import RunDirectory

        directory = RunDirectory(run_directory)
        render(directory, load(directory.results))
        show(f"Report: {directory.report}")


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, ONNX file, plan or run directory; for --groups a checkpoint, a run or a model "
            "factory: torchvision:NAME, timm:NAME, espalier:NAME, package.module:function.",
            metavar="TARGET",
        ),
    ],
    groups: Annotated[
        bool, typer.Option("--groups", help="Trace the network: what of it can be pruned, what stays and why.")
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Sizes of an image that the network, or its part, is traced with.  \\[default: as the checkpoint or "
            "timm says, else 3,224,224]",
            metavar="C,H,W",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="What of attention can go: heads, widths (channels of all heads) or keep.  \\[default: heads, or what "
            "the run's recipe says, as for all of these]",
            metavar="WHAT",
        ),
    ] = None,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Also channels that a normalisation mixes with others.")
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Module whose output channels stay; repeatable."),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Module none of whose tensors is cut; repeatable."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="MODULE", help="Submodule that alone is traced, such as a detector's backbone."),
    ] = None,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint, an ONNX file, a plan or a run holds, or the channel groups of a network."""
    with command(debug=debug):
        from compress.errors import InputError
        from deploy import inspection, inspection_groups

        options = {"attention": attention, "embedding": embedding, "ignore": ignore, "protect": protect, "part": part}
        given = {name: value for name, value in options.items() if value}
        if groups:
            found = inspection_groups.inspect_groups(target, shape=shape, trust=trust or (), options=given)
        elif given or shape or trust:
            names = [*given, *(["shape"] if shape else []), *(["trust"] if trust else [])]
            raise InputError(f"--{' and --'.join(names)}: of use with --groups only; add that, or leave it out.")
        else:
            found = inspection.inspect(Path(target))
        if json:
            emit(found)
        else:
            show(*inspection.tables(found))


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Show versions and devices, what is missing, and which extra brings it."""
    with command(debug=debug):
        from deploy import doctor as examination

        found = examination.examine()
        if json:
            emit(found)
        else:
            show(*examination.tables(found))


def main() -> None:
    """The console entry point."""
    app()


def _recipe(path: Path | None, changes: list[str] | None) -> "Recipe":
    from deploy.recipe_text import read_recipe

    return read_recipe(path, changes or ())


if __name__ == "__main__":
    main()
