"""From a typed ONNX file to a TensorRT engine that stands in a manifest: one code path for TensorRT 10.12 to 11."""

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import InputError, WorkError
from compress.files import make_directory, replacing
from deploy import manifest
from deploy.engine_settings import BatchRange, BuilderSettings, read_builder_settings
from deploy.engine_source import Source, profile_of, read_source
from deploy.runtimes import cuda
from deploy.tensorrt_binding import Errors, building, import_tensorrt, make_monitor, process_logger
from deploy.trust import trust_plan

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

__all__ = ["BatchRange", "BuilderSettings", "build_engine", "read_builder_settings"]

SUFFIX = ".plan"


def build_engine(
    onnx: Path, plan: Path, *, batch: BatchRange, settings: BuilderSettings | None = None, device: str = "cuda"
) -> manifest.Entry:
    """Build the engine `plan` from the file `onnx` for the GPU `device`, and enter it in its folder's manifest.

    The number formats are those of the ONNX file: the network is strongly typed. The engine is trusted from then
    on, as it was built here. It runs on this model of GPU with this version of TensorRT only, unless `settings`
    ask for more.

    Args:
        batch: the batch sizes that the engine will take; all other dimensions must be fixed in the file.

    Raises:
        MissingExtraError: TensorRT is not installed.
        InputError: there is no such GPU, or the file is made for the CPU, holds an operator that TensorRT lacks, or
            has dynamic dimensions besides the batch.
        WorkError: TensorRT could not build it, for lack of memory for one, or the disk is full.
        KeyboardInterrupt: the user stopped the build; nothing is left of it.
    """
    onnx, plan = Path(onnx), Path(plan)
    settings = settings or BuilderSettings()
    if plan.suffix != SUFFIX:
        raise InputError(f"{plan} does not end in {SUFFIX}, by which engines are known; name it {plan.stem}{SUFFIX}.")
    trt = import_tensorrt("Building a TensorRT engine")
    gpu = cuda.CudaDevice(torch.device(device))
    source = read_source(onnx)
    profiles = {spec.name: profile_of(spec, batch, onnx) for spec in source.inputs}
    make_directory(plan.parent)
    if not os.access(plan.parent, os.W_OK):  # known before the build, which takes minutes
        raise InputError(f"Cannot write {plan}: no permission; choose a directory you can write.")
    began = time.monotonic()
    with gpu.current():
        content, timing_cache = _build(trt, source, profiles, settings)
    with replacing(plan) as temporary:
        temporary.write_bytes(content)
    entry = manifest.add(
        plan.parent,
        plan.name,
        kind="plan",
        precision=source.precision,
        target=source.metadata.target if source.metadata else "any",
        inputs=source.inputs,
        outputs=source.outputs,
        checkpoint_digest=source.metadata.checkpoint_sha256 if source.metadata else "",
        source_digest=source.digest,
        quantisation=source.metadata.quantisation if source.metadata else None,
        engine=manifest.EngineRecord(
            tensorrt_version=trt.__version__,
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            profiles=profiles,
            settings=settings.model_dump(mode="json"),
        ),
    )
    # The digest of what was built, not of what the disk holds by now.
    trust_plan(hashlib.sha256(content).hexdigest())
    if settings.timing_cache is not None and timing_cache is not None:
        with replacing(settings.timing_cache) as temporary:
            temporary.write_bytes(timing_cache)
    logger.info("built %s in %.0f s, %.1f MB", plan, time.monotonic() - began, entry.size_bytes / 1e6)
    return entry


def _build(
    trt: ModuleType, source: Source, profiles: dict[str, manifest.Profile], settings: BuilderSettings
) -> tuple[bytes, bytes | None]:
    """The serialised engine, and the serialised timing cache if `settings` name a file for one."""
    # Every object stays referenced until the build is over: the network reads its weights from the parser's memory.
    log = process_logger(trt)
    errors = Errors(trt)
    trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    builder.error_recorder = errors.recorder
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    _parse(trt, parser, source.path)
    config = builder.create_builder_config()
    _configure(trt, config, settings)
    profile = builder.create_optimization_profile()
    for name, shapes in profiles.items():
        profile.set_shape(name, shapes.minimum, shapes.optimum, shapes.maximum)
    if config.add_optimization_profile(profile) < 0:
        raise WorkError(f"TensorRT refused the batch range of {source.path}: {errors.reason()}.")
    cache = _load_timing_cache(config, settings.timing_cache)
    errors.clear()  # a timing cache of no use is no reason for a build to fail
    with building(f"building {source.path.stem}") as progress:
        monitor = make_monitor(trt, progress)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise WorkError(_failure(source.path, errors))
    return bytes(serialized), None if cache is None else bytes(cache.serialize())


def _failure(path: Path, errors: Errors) -> str:
    if errors.out_of_memory:
        return (
            f"TensorRT ran out of GPU memory while it built {path}: {errors.reason()}; give less --workspace or a "
            "smaller largest batch, or free memory of the GPU."
        )
    return f"TensorRT could not build {path}: {errors.reason()}; --debug shows its whole log."


def _parse(trt: ModuleType, parser: "tensorrt.OnnxParser", path: Path) -> None:
    if parser.parse_from_file(str(path)):
        return
    problems = [_problem(parser.get_error(index)) for index in range(parser.num_errors)]
    said = "; ".join(problem.text for problem in problems) or "it gave no reason"
    ours = (trt.ErrorCode.MEM_ALLOC_FAILED, trt.ErrorCode.INTERNAL_ERROR)
    if problems and all(problem.code in ours for problem in problems):
        raise WorkError(f"TensorRT {trt.__version__} failed while it read {path}: {said}; try again.")
    raise InputError(
        f"TensorRT {trt.__version__} cannot build {path}: {said}; change the model so that it does without, or run "
        "the file with ONNX Runtime."
    )


@dataclass(frozen=True)
class _Problem:
    code: Any
    """A `tensorrt.ErrorCode`."""
    text: str
    """With the node where it occurred."""


def _problem(found: "tensorrt.ParserError") -> _Problem:
    operator, name = found.node_operator(), found.node_name()
    where = f"node {name or found.node()} ({operator}): " if operator or name else ""
    return _Problem(found.code(), where + " ".join(found.desc().split()).rstrip("."))


def _configure(trt: ModuleType, config: "tensorrt.IBuilderConfig", settings: BuilderSettings) -> None:
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is set by default
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if settings.hardware_compatible == "same-compute-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    elif settings.hardware_compatible == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _load_timing_cache(config: "tensorrt.IBuilderConfig", path: Path | None) -> "tensorrt.ITimingCache | None":
    """Let the build start from the cache in the file, or from an empty one where there is none of use here."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise InputError(f"Cannot read the timing cache {path}: {error.strerror}; name another file.") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("the timing cache %s is damaged, or of another GPU or TensorRT: a new one replaces it", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
