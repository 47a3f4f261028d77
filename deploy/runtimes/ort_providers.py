"""ONNX Runtime's execution providers: which one runs on which device, what it needs, how it is set up."""

import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from compress.errors import InputError, MissingExtraError
from compress.files import make_directory, sha256
from deploy.onnx_file import external_name
from deploy.runtimes.device import Device

TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


@dataclass(frozen=True)
class Provider:
    """One execution provider."""

    label: str
    """What users and descriptions call it."""
    name: str
    """What ONNX Runtime calls it."""
    device: str
    """Kind of device that it computes on."""
    extra: str
    """The extra that brings a build of ONNX Runtime which has it."""


PROVIDERS = {
    provider.label: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "cpu", "cpu"),
        Provider("cuda", "CUDAExecutionProvider", "cuda", "gpu"),
        Provider("tensorrt", "TensorrtExecutionProvider", "cuda", "gpu"),
    )
}


def choose(label: str | None, device: Device) -> Provider:
    """The provider of that label; None means the one called like the kind of device.

    Raises:
        InputError: there is none, or it computes on another kind of device.
    """
    if label is None:
        if device.type not in PROVIDERS:
            raise InputError(f"ONNX Runtime is not used on device {device}; choose cpu or cuda.")
        return PROVIDERS[device.type]
    if label not in PROVIDERS:
        raise InputError(
            f"The provider {label!r} of onnxruntime is none that we use; choose one of {', '.join(PROVIDERS)}."
        )
    provider = PROVIDERS[label]
    if provider.device != device.type:
        raise InputError(
            f"onnxruntime:provider={label} computes on {provider.device}, but the device asked for is {device}; "
            f"choose device {provider.device} or another provider."
        )
    return provider


def library(provider: Provider, device: Device) -> ModuleType:
    """The module onnxruntime, which has that provider.

    Raises:
        InputError: the installed build lacks the provider, or TensorRT is of a version that it does not link.
        MissingExtraError: it is not installed.
    """
    if provider.label == "tensorrt":
        _load_tensorrt()
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", provider.extra, "Running an ONNX file") from error
    available = onnxruntime.get_available_providers()
    if provider.name not in available:
        raise InputError(
            f"Device {device} needs {provider.name}, but the installed onnxruntime has only {', '.join(available)}; "
            f"install the one that has it with pip uninstall onnxruntime && pip install 'espalier[{provider.extra}]'."
        )
    return onnxruntime


def provider_options(provider: Provider, device: Device, cache: Path | None, *, cuda_graph: bool) -> dict[str, str]:
    """How the provider is set up.

    The precision is never set here: it lives in the file, and a TensorRT network without such flags is strongly typed.

    Args:
        cache: where the TensorRT provider keeps what it built, see `engine_cache`.
    """
    if provider.label == "cpu":
        return {}
    options = {"device_id": str(device.index or 0)}
    if provider.label == "cuda":
        # fp32 is fp32: the provider's own default rounds the inputs of convolutions to TF32.
        return options | {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    options |= {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }
    return options | ({"trt_cuda_graph_enable": "True"} if cuda_graph else {})


def engine_cache(path: Path) -> Path:
    """Folder for the engines that ONNX Runtime's TensorRT provider builds from that very file.

    It lies among the user's own caches and is closed to others, since an engine is executable code; beside the
    file, a repository of artefacts could bring engines of its own.

    Raises:
        InputError: it cannot be created.
    """
    weights = path.with_name(external_name(path))
    digest = sha256(path)
    if weights.is_file():
        digest = hashlib.sha256((digest + sha256(weights)).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "espalier" / "ort-tensorrt" / digest
    make_directory(folder)
    folder.chmod(0o700)
    return folder


def installed_tensorrt() -> str | None:
    """Version of the TensorRT that pip installed, None where it installed none."""
    for distribution in TENSORRT_DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _load_tensorrt() -> None:
    """Put TensorRT's libraries into the process: pip installs them where the dynamic loader does not look."""
    found = installed_tensorrt()
    if found is None:
        raise InputError(
            "ONNX Runtime's TensorRT provider needs TensorRT 10 (libnvinfer.so.10), which is not installed: "
            "run pip install 'tensorrt-cu13<11'."
        )
    if not found.startswith("10."):
        raise InputError(
            f"TensorRT {found} is installed, but ONNX Runtime's TensorRT provider is linked with TensorRT 10 "
            "(libnvinfer.so.10): run pip install 'tensorrt-cu13<11', or let our own runtime execute an engine "
            "(espalier engine, then --runtime tensorrt)."
        )
    from deploy.tensorrt_binding import import_tensorrt

    import_tensorrt("ONNX Runtime's TensorRT provider")
