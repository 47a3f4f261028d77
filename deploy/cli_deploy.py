"""The commands that make and serve deployable files: export, engine, triton."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_app import Debug, Json, Trust, app, listed
from deploy.console import command, emit, show


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
            help="Images for int8 and fp8: digits, glyphs, cifar10:/path, imagefolder:/path, segmentation:/path, "
            "package.module:function.",
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
    part: Annotated[
        str | None,
        typer.Option(
            help="Submodule that is exported alone, with all its outputs, such as a detector's backbone.",
            metavar="NAME",
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
        from compress.tasks import task_named
        from deploy.artefacts import calibration_samples, export_checkpoint
        from deploy.precision.settings import read_settings, read_targets

        settings = read_settings(
            precision=listed(precision),
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
            task = task_named(loaded.task, trust=trust or ())
            drawn = calibration_samples(loaded, samples, task=task)
        place = checkpoint.resolve()
        folder = out or place.parent / "artifacts"
        entries = export_checkpoint(
            checkpoint,
            folder,
            name=place.name if part is None else f"{place.name}.{part}",
            settings=settings,
            wanted=read_targets(listed(target)),
            samples=drawn,
            part=part,
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
