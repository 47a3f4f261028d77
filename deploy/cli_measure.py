"""The commands that hold files against each other, their checkpoint and an older run: bench, compare."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_app import Debug, Json, Threads, Trust, app, listed
from deploy.console import command, emit, show

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TrustedManifest = Annotated[
    Path | None,
    typer.Option(
        metavar="MANIFEST",
        help="A manifest.json that you trust: plans listed in it may be executed.  \\[default: only plans built here]",
    ),
]


@app.command()
def bench(
    artefacts: Annotated[
        list[str],
        typer.Argument(
            help="ONNX files, plans, checkpoints or package.module:function, each with @RUNTIME behind it if need be; "
            "the first is the baseline.",
            metavar="A B C",
        ),
    ],
    batch: Annotated[
        str | None, typer.Option(help="Samples of a query, with commas between.  \\[default: 1]", metavar="N,M")
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            help="MLPerf's SingleStream (batch 1), MultiStream (batch 8), Offline (a large batch), Server (random "
            "arrivals), with commas between; no MLPerf submission.  \\[default: those of --batch]",
            metavar="NAMES",
        ),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Most latency of Server's 99th percentile.", metavar="MILLISECONDS")
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(help="Queries at once: sweep the throughput over these and --batch.", metavar="N,M"),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Time the layers too: why is B not faster than A?")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to time on, as for compare.  \\[default: random numbers, standard normal]", metavar="DATA"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of an input, without the batch, where a file leaves them open; repeatable.",
            metavar="NAME=3,224,224",
        ),
    ] = None,
    time: Annotated[
        float, typer.Option(help="Most seconds for each batch size; less where all ratios are known to 0.5 %.")
    ] = 60.0,
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds at least, if the time allows.")] = 10,
    seconds: Annotated[float, typer.Option(min=0, help="Least time of an artefact in a round.")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes of each, one after the other.")] = 3,
    threads: Threads = None,
    device: Device = "cpu",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="What runs the artefacts of its kind, NAME or NAME:option=value, such as "
            "onnxruntime:provider=tensorrt or pytorch:compile=true; repeatable.",
            metavar="NAME",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order, the inputs, the arrivals and the bootstrap.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, results.csv, report.html and the figures.", metavar="DIR"),
    ] = None,
    trust_manifest: TrustedManifest = None,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time artefacts against each other: interleaved rounds, fresh processes, intervals, a verdict."""
    with command(debug=debug):
        from benchmarks.harness.rounds import Plan
        from benchmarks.harness.tables import summary
        from compress.files import make_directory
        from deploy import bench_settings, bench_targets, benching, explaining_views

        opening = bench_targets.Opening(
            device=device, threads=threads, trusted_manifest=trust_manifest, trust=tuple(trust or ())
        )
        batches = bench_settings.read_numbers(batch, "--batch")
        settings = bench_settings.Settings(
            batch_sizes=bench_settings.read_scenarios(listed(scenario or ""), batches, limit),
            plan=Plan(
                rounds=rounds,
                seconds=seconds,
                time_budget_s=time,
                processes=processes,
                idle_gap_s=bench_settings.GAP_S,
            ),
            data=data,
            shapes=bench_targets.read_shapes(shape or ()),
            limit_ms=limit,
            lanes=bench_settings.read_numbers(streams, "--streams"),
            explain=explain,
            seed=seed,
        )
        if out is not None:
            make_directory(out)  # before minutes of measuring, not after
        targets = bench_targets.read_targets(artefacts, runtime or (), opening)
        results = benching.bench(targets, settings, opening)
        if out is not None:
            benching.write(results, out)
        if json:
            emit(results.to_json())
        else:
            explained = [part for explanation in results.explanations for part in explaining_views.tables(explanation)]
            show(summary(results), *explained, *([f"Report: {out / 'report.html'}"] if out is not None else []))
        benching.require_all(results)


@app.command()
def compare(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint directory, or the results.json of an earlier run.", metavar="CHECKPOINT|OLD.json"
        ),
    ],
    artefacts: Annotated[
        list[Path],
        typer.Argument(
            help="ONNX files or plans made from it, or the results.json of a later run.", metavar="FILE|NEW.json"
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images for the files: digits, glyphs, cifar10:/path, imagefolder:/path, segmentation:/path, "
            "package.module:function. "
            "Needed with a checkpoint."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Test images on which logits are compared.")] = 64,
    device: Device = "cpu",
    runtime: Annotated[
        str | None, typer.Option(help="What runs the files, NAME or NAME:option=value.", metavar="NAME")
    ] = None,
    first_layer: Annotated[
        bool, typer.Option("--first-layer", help="Find the first layer of a bad ONNX file that diverges.")
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="For results documents: end with 1 if a cell is slower:2% (its whole 95 % interval is; where only the "
            "estimate is, it is called unclear, maybe, and does not fail) or top-1 lost more points than accuracy:0.5. "
            "Commas between, or repeatable.  \\[default: failed, which is always on: what failed and did not before]",
        ),
    ] = None,
    trust_manifest: TrustedManifest = None,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold deployable files against their checkpoint in PyTorch: errors, top class, and accuracy of each file.

    Or two results documents against each other, OLD.json NEW.json: latency, rates, accuracy, failures.
    """
    with command(debug=debug):
        from compress.errors import InputError
        from deploy import comparing_results

        def given(*names: str) -> list[str]:
            sources = {name: context.get_parameter_source(name) for name in names}
            written = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
            return [f"--{name.replace('_', '-')}" for name in written]

        if comparing_results.are_results(checkpoint, artefacts):
            of_files = given("data", "samples", "device", "runtime", "first_layer", "trust_manifest", "trust")
            comparing_results.refuse_options(of_files, form="CHECKPOINT FILES")
            regression, judgement = comparing_results.compare_documents(checkpoint, artefacts[0], fail_on or ())
            if json:
                emit(regression.model_dump(mode="json"))
            else:
                from benchmarks.harness.regression_table import summary

                show(*summary(regression, judgement))
            comparing_results.require(judgement)
            return

        comparing_results.refuse_options(given("fail_on"), form="OLD.json NEW.json")
        if data is None:
            raise InputError("--data is missing: say which images the files are compared on, such as --data digits.")
        from deploy import comparing

        found = comparing.compare(
            checkpoint,
            artefacts,
            data,
            samples=samples,
            device=device,
            runtime=runtime,
            trusted_manifest=trust_manifest,
            first_layer=first_layer,
            trust=trust or (),
        )
        if json:
            emit(found)
        else:
            show(*comparing.tables(found))
        comparing.require(found)
