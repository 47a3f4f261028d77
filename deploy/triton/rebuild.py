"""The script that builds an engine again with the TensorRT of the container that serves it."""

import shlex
from typing import Final

from pydantic import ValidationError

from compress.errors import InputError
from deploy.engine_settings import BuilderSettings
from deploy.manifest import EngineRecord, Entry
from deploy.tensor_spec import TensorSpec

FOLDER: Final = "rebuild"
"""Folder of the model that holds the script and the ONNX file; Triton looks only into numbered ones."""

SCRIPT: Final = "rebuild.sh"

_HARDWARE: Final = {"same-compute-capability": "sameComputeCapability", "ampere-plus": "ampere+"}


def script(entry: Entry, record: EngineRecord, onnx: str) -> str:
    """A shell script that builds `1/model.plan` from the ONNX file `onnx` beside the script.

    The container of TensorRT is taken for the one of Triton because both of one month hold the same TensorRT
    (triton-inference-server/server, docs/user_guide/custom_operations.md), and `trtexec` belongs to it. The flag
    --stronglyTyped is needed by TensorRT 10 and has no effect in 11.

    Raises:
        InputError: the manifest records other settings than a builder has.
    """
    try:
        settings = BuilderSettings.model_validate(record.settings)
    except ValidationError as error:
        raise InputError(
            f"The manifest does not say how {entry.file} was built: build it again with espalier engine."
        ) from error
    trtexec = " \\\n  ".join(map(shlex.quote, _trtexec(entry, record, settings, onnx)))
    espalier = " ".join(map(shlex.quote, _espalier(entry, record, settings, onnx)))
    plan = shlex.quote(onnx.removesuffix(".onnx") + ".plan")
    capability = ".".join(map(str, record.compute_capability))
    return f"""\
#!/bin/sh
# Builds 1/model.plan again: an engine runs only with the version of TensorRT that built it, and on its model of GPU.
# The one written here: TensorRT {_line(record.tensorrt_version)}, {_line(record.gpu)}, compute capability {capability}.
# Run it on the machine that serves, with the tag of the Triton container (nvcr.io/nvidia/tritonserver:TAG-py3):
#   sh {SCRIPT} YY.MM
# The same without a container, where Espalier and the server's version of TensorRT are installed:
#   {_line(espalier)} && mv {_line(plan)} ../1/model.plan
set -eu
tag=${{1:?give the tag of the Triton container as YY.MM}}
model=$(cd "$(dirname "$0")/.." && pwd)
docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$model:/model" "nvcr.io/nvidia/tensorrt:$tag-py3" trtexec \
  {trtexec}
mv "$model/{FOLDER}/model.plan" "$model/1/model.plan"
"""


def _trtexec(entry: Entry, record: EngineRecord, settings: BuilderSettings, onnx: str) -> list[str]:
    """Arguments of `trtexec` in the container."""
    arguments = [
        f"--onnx=/model/{FOLDER}/{onnx}",
        f"--saveEngine=/model/{FOLDER}/model.plan",
        "--skipInference",
        "--stronglyTyped",
    ]
    for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = (f"{spec.name}:{'x'.join(map(str, _shapes(record, spec)[index]))}" for spec in entry.inputs)
        arguments.append(f"--{flag}={','.join(shapes)}")
    arguments.append(f"--builderOptimizationLevel={settings.optimization_level}")
    if not settings.tf32:
        arguments.append("--noTF32")
    if settings.workspace_bytes is not None:
        arguments.append(f"--memPoolSize=workspace:{settings.workspace_bytes}B")
    if settings.version_compatible:
        arguments.append("--versionCompatible")
    if settings.hardware_compatible != "none":
        arguments.append(f"--hardwareCompatibilityLevel={_HARDWARE[settings.hardware_compatible]}")
    if settings.refittable:
        arguments.append("--refit")
    return arguments


def _espalier(entry: Entry, record: EngineRecord, settings: BuilderSettings, onnx: str) -> list[str]:
    """The same build in Espalier's words."""
    batch = ":".join(str(shape[0]) for shape in _shapes(record, entry.inputs[0]))
    words = ["espalier", "engine", onnx, "--batch", batch, "--opt-level", str(settings.optimization_level)]
    if settings.tf32:
        words.append("--tf32")
    if settings.workspace_bytes is not None:
        words += ["--workspace", str(settings.workspace_bytes)]
    if settings.version_compatible:
        words.append("--version-compatible")
    if settings.hardware_compatible != "none":
        words += ["--hardware-compatible", settings.hardware_compatible]
    if settings.refittable:
        words.append("--refittable")
    return words


def _shapes(record: EngineRecord, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
    profile = record.profiles[spec.name]
    return profile.minimum, profile.optimum, profile.maximum


def _line(text: str) -> str:
    """The text on one line, as it goes into a comment of a script."""
    return " ".join(text.split())
