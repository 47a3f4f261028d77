"""`config.pbtxt`, written and read back with Triton's own protobuf."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from compress.errors import InputError, MissingExtraError, WorkError
from deploy.choosing import Choice
from deploy.tensor_spec import TensorSpec
from deploy.triton.batching import Batching

LABELS: Final = "labels.txt"

PLATFORMS: Final = {"onnx": ("onnxruntime_onnx", "onnxruntime"), "plan": ("tensorrt_plan", "tensorrt")}
"""Kind of artefact -> Triton's platform and backend."""

_TYPES: Final = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}


def model_config(
    choice: Choice, *, name: str, max_batch: int, instances: int, batching: Batching, labelled: bool
) -> Any:
    """Triton's `ModelConfig` for an artefact.

    An engine runs on the GPU with CUDA graphs. An ONNX file runs on the device that it was made for, else on the one it
    was timed on, there with as many threads; else the server chooses.

    Args:
        labelled: whether `LABELS` lies beside the configuration.

    Raises:
        MissingExtraError: Triton's client library is not installed.
        InputError: the artefact does not take all batch sizes from 1 to `max_batch`, or a tensor has a type that
            Triton lacks.
    """
    triton = protobuf()
    entry = choice.entry
    _require_batches(choice, max_batch)
    platform, backend = PLATFORMS[entry.kind]
    config = triton.ModelConfig(name=name, platform=platform, backend=backend, max_batch_size=max_batch)
    for spec in entry.inputs:
        config.input.add(name=spec.name, data_type=_type(triton, spec, choice.path), dims=_dims(spec))
    for index, spec in enumerate(entry.outputs):
        labels = LABELS if labelled and index == 0 else ""
        config.output.add(
            name=spec.name, data_type=_type(triton, spec, choice.path), dims=_dims(spec), label_filename=labels
        )
    if batching.dynamic:
        config.dynamic_batching.preferred_batch_size.extend(batching.preferred_sizes)
        config.dynamic_batching.max_queue_delay_microseconds = batching.max_queue_delay_us
    kind = instance_kind(choice)
    config.instance_group.add(kind=getattr(triton.ModelInstanceGroup, kind), count=instances)
    if entry.kind == "plan":
        # Triton then captures graphs for batch 1, the preferred sizes and the largest.
        config.optimization.cuda.graphs = True
    if kind == "KIND_CPU" and (threads := _threads(choice)) is not None:
        config.parameters["intra_op_thread_count"].string_value = str(threads)
    for size in batching.warmup_sizes(max_batch):
        sample = config.model_warmup.add(name=f"batch_{size}", batch_size=size)
        for spec in entry.inputs:
            given = sample.inputs[spec.name]
            given.data_type = _type(triton, spec, choice.path)
            given.dims.extend(_dims(spec))
            given.input_data_file = warmup_file(spec)
    return config


def instance_kind(choice: Choice) -> str:
    """Name of Triton's enumerator for where the instances run."""
    entry = choice.entry
    if entry.kind == "plan" or entry.target == "gpu":
        return "KIND_GPU"
    if entry.target == "cpu":
        return "KIND_CPU"
    return {"cpu": "KIND_CPU", "cuda": "KIND_GPU", None: "KIND_AUTO"}[choice.device]


def warmup_file(spec: TensorSpec) -> str:
    """Name of the file in the folder `warmup/` that holds one sample of the input."""
    return f"{spec.name}.raw"


def warmup_sample(spec: TensorSpec) -> bytes:
    """One sample of the input without its batch: numbers as normalised images have them.

    Triton's own `random_data` are random bytes, which as floats include NaN, infinity and subnormals.
    """
    shape = [size for size in spec.shape[1:] if isinstance(size, int)]
    numbers = np.random.default_rng(0).standard_normal(math.prod(shape)).astype(spec.dtype)
    return numbers.tobytes()


def to_text(config: Any) -> str:
    """The configuration as text, which Triton's parser is proven to read back as it was.

    Raises:
        WorkError: it does not.
    """
    from google.protobuf import text_format  # type: ignore[import-untyped]

    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, protobuf().ModelConfig()) != config:
        raise WorkError("The Triton configuration does not read back as it was written; report it as a bug.")
    return text


def protobuf() -> ModuleType:
    """Triton's protobuf of the model configuration.

    Raises:
        MissingExtraError: `tritonclient` with its gRPC part is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed without gRPC
        raise MissingExtraError("tritonclient", "triton", "Writing a Triton model repository") from error
    module: ModuleType = model_config_pb2
    return module


def _require_batches(choice: Choice, max_batch: int) -> None:
    """Refuse an artefact that does not take every batch size from 1 to `max_batch`."""
    for spec in choice.entry.inputs:
        if not spec.shape or isinstance(spec.shape[0], int):
            raise InputError(f"{choice.path} has a fixed batch size ({spec}): export it again with espalier export.")
        if not all(isinstance(size, int) for size in spec.shape[1:]):
            raise InputError(f"{choice.path} has no fixed image size ({spec}): export it again with espalier export.")
    if choice.entry.kind != "plan":
        return
    profiles = choice.entry.engine.profiles if choice.entry.engine else {}
    for spec in choice.entry.inputs:
        if spec.name not in profiles:
            raise InputError(
                f"The manifest does not say which batch sizes {choice.path} takes: build it again with espalier engine."
            )
        low, high = profiles[spec.name].minimum[0], profiles[spec.name].maximum[0]
        if low > 1 or high < max_batch:
            raise InputError(
                f"{choice.path} takes batches of {low} to {high}, and the server would send 1 to {max_batch}: lower "
                f"--max-batch to at most {high}, or build it again with espalier engine --batch "
                f"1:{min(8, max_batch)}:{max(high, max_batch)}."
                if low == 1
                else f"{choice.path} takes batches of {low} to {high}, but a server also gets single images: build it "
                f"again with espalier engine --batch 1:{min(8, max_batch)}:{max(high, max_batch)}."
            )


def _type(triton: ModuleType, spec: TensorSpec, path: Path) -> int:
    if spec.dtype not in _TYPES:
        raise InputError(f"{path}: {spec.name} is {spec.dtype}, which Triton cannot serve: export it with float32.")
    value: int = triton.DataType.Value(_TYPES[spec.dtype])
    return value


def _dims(spec: TensorSpec) -> list[int]:
    """Sizes without the batch; -1 where a size is not fixed."""
    return [size if isinstance(size, int) else -1 for size in spec.shape[1:]]


def _threads(choice: Choice) -> int | None:
    """CPU threads of one inference when it was timed on the CPU."""
    proof = choice.timed.runtime.proof if choice.timed and choice.device == "cpu" else None
    threads = proof.get("threads") if isinstance(proof, dict) else None
    return threads if isinstance(threads, int) and threads > 0 else None
