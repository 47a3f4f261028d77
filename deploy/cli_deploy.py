"""The commands that make, time, check and serve deployable files: export, engine, bench, compare, triton."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_app import Debug, Json, Threads, Trust, app
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
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.", metavar="CHECKPOINT")],
    precision: Annotated[
        str, typer.Option(help="Number formats, with commas between: fp32, fp16, bf16, int8, fp8.", metavar="A,B")
    ] = "fp32",
    target: Annotated[
        str,
        typer.Option(help="What int8 and fp8 files are made for: cpu (ONNX Runtime) or gpu (TensorRT, CUDA), or both."),
    ] = "cpu,gpu",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Images for int8 and fp8: digits, glyphs, cifar10:/path, imagefolder:/path, package.module:function.",
            metavar="DATA",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Training images of DATA to calibrate on.")] = 256,
    method: Annotated[str, typer.Option(help="Calibration: minmax, entropy or percentile.")] = "minmax",
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Layer, or pattern of layers, that stays in floating point; repeatable."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Points of top-1 on DATA's test split that int8 and fp8 may lose: the layers that harm most stay in "
            "floating point until it is met.",
        ),
    ] = None,
    fp32_io: Annotated[bool, typer.Option("--fp32-io", help="fp16 and bf16 files take and give fp32.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.  \\[default: artifacts beside the checkpoint]", metavar="DIR")
    ] = None,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint as ONNX files with dynamic batch, one per precision, and enter them in the manifest."""
    with command(debug=debug):
        from benchmarks.harness import numerals
        from compress import data
        from compress.checkpoint import Architecture
        from deploy.artefacts import calibration_samples, export_checkpoint
        from deploy.precision.settings import read_settings, read_targets

        settings = read_settings(
            precision=_listed(precision),
            calibration=method,
            samples=samples,
            exclude=exclude or (),
            max_drop=max_drop,
            fp32_io=fp32_io,
        )
        drawn = None
        if calibration is not None:
            side = Architecture.read(checkpoint).image_shape[-1]
            loaded = data.load(calibration, batch_size=64, image_size=side, augment=False, trust=trust or ())
            drawn = calibration_samples(loaded, samples)
        place = checkpoint.resolve()
        folder = out or place.parent / "artifacts"
        entries = export_checkpoint(
            checkpoint,
            folder,
            name=place.name,
            settings=settings,
            wanted=read_targets(_listed(target)),
            samples=drawn,
            trust=trust or (),
        )
        if json:
            emit([{"path": str(folder / entry.file), **entry.model_dump(mode="json")} for entry in entries])
        else:
            for entry in entries:
                show(f"{folder / entry.file}  {numerals.size(entry.size_bytes)}  SHA-256 {entry.sha256}")


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(help="ONNX file.", metavar="MODEL.onnx")],
    batch: Annotated[
        str, typer.Option(help="Smallest, usual and largest batch that the engine takes.", metavar="MIN:OPT:MAX")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write.  \\[default: MODEL.plan beside the ONNX file]", metavar="FILE")
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(
            help="Most GPU memory that one layer may use, such as 512MiB or 4GiB.  \\[default: all]", metavar="SIZE"
        ),
    ] = None,
    opt_level: Annotated[int, typer.Option(min=0, max=5, help="0 builds fastest, 5 searches longest.")] = 3,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 layers round their inputs to TF32.")] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Kernel timings, read before the build and written after it.", metavar="FILE")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later versions of TensorRT can run the engine.")
    ] = False,
    hardware_compatible: Annotated[
        str, typer.Option(help="GPUs that can run it: none but this model, same-compute-capability, ampere-plus.")
    ] = "none",
    refittable: Annotated[
        bool, typer.Option("--refittable", help="The weights can be replaced without building again.")
    ] = False,
    device: Annotated[str, typer.Option(help="GPU to build on and for: cuda or cuda:N.")] = "cuda",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build a TensorRT engine from an ONNX file, in the file's own precision, and enter it in the manifest."""
    with command(debug=debug, advice="nothing of the engine was kept."):
        from benchmarks.harness import numerals
        from compress.errors import InputError
        from deploy.engine import build_engine
        from deploy.engine_settings import BatchRange, read_builder_settings

        settings = read_builder_settings(
            workspace=workspace,
            optimization_level=opt_level,
            tf32=tf32,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            refittable=refittable,
            timing_cache=timing_cache,
        )
        if not model.is_file():
            raise InputError(f"{model} does not exist or is not a file; give an ONNX file.")
        path = out or model.with_suffix(".plan")
        entry = build_engine(model, path, batch=BatchRange.parse(batch), settings=settings, device=device)
        if json:
            emit({"path": str(path), **entry.model_dump(mode="json")})
        else:
            show(f"{path}  {numerals.size(entry.size_bytes)}  SHA-256 {entry.sha256}")


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
        from deploy import bench_targets, benching, explaining_views

        opening = bench_targets.Opening(
            device=device, threads=threads, trusted_manifest=trust_manifest, trust=tuple(trust or ())
        )
        batches = benching.read_numbers(batch, "--batch")
        settings = benching.Settings(
            batch_sizes=benching.read_scenarios(_listed(scenario or ""), batches, limit),
            plan=Plan(
                rounds=rounds,
                seconds=seconds,
                time_budget_s=time,
                processes=processes,
                idle_gap_s=benching.GAP_S,
            ),
            data=data,
            shapes=bench_targets.read_shapes(shape or ()),
            limit_ms=limit,
            lanes=benching.read_numbers(streams, "--streams"),
            explain=explain,
            seed=seed,
        )
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
            help="Images for the files: digits, glyphs, cifar10:/path, imagefolder:/path, package.module:function. "
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


@app.command()
def triton(
    run_directory: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN_DIR")],
    name: Annotated[str, typer.Option(help="Name of the model on the server.")],
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch that the server forms.")],
    artefact: Annotated[
        str | None,
        typer.Option(
            help="File of RUN_DIR/artifacts to serve.  \\[default: the pruned network's engine, else its fastest file]",
            metavar="FILE",
        ),
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model that run at once on each device.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Model repository to write.  \\[default: RUN_DIR/triton]", metavar="DIR")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a Triton model repository from a run: configuration, labels, warm-up, batching as measured."""
    with command(debug=debug):
        from deploy.triton import write_repository

        found = write_repository(
            run_directory, out, name=name, max_batch=max_batch, artefact=artefact, instances=instances
        )
        if json:
            emit(found.as_dict())
        else:
            show(*found.sentences())


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
