"""Whether a TensorRT engine runs on this GPU with this TensorRT, by what the manifest records of its build.

TensorRT checks the same, but says so in its own terms, and on some other GPUs it only warns of slow kernels.
"""

from pathlib import Path

from compress.errors import InputError
from deploy import manifest
from deploy.runtimes.cuda import CudaDevice
from deploy.tensorrt_binding import version_numbers

AMPERE = (8, 0)
"""First compute capability that an engine of hardware compatibility "ampere-plus" runs on."""


def record_of(path: Path, entry: manifest.Entry) -> manifest.EngineRecord:
    """The manifest's record of how the engine was built.

    Raises:
        InputError: there is none.
    """
    if entry.engine is None:
        raise InputError(
            f"The manifest does not say for which GPU and TensorRT {path} was built; build it again with espalier "
            "engine."
        )
    return entry.engine


def require_fit(path: Path, record: manifest.EngineRecord, version: str, device: CudaDevice) -> None:
    """The engine was built for this GPU and this TensorRT, or so that it runs on others and these are among them.

    Raises:
        InputError: they are not; names both.
    """
    built, here = record.compute_capability, device.compute_capability
    fits = {
        "same-compute-capability": built == here,
        "ampere-plus": here >= AMPERE,
    }.get(record.settings.get("hardware_compatible", "none"), (record.gpu, built) == (device.name, here))
    if not fits:
        raise InputError(
            f"{path} was built for the {record.gpu} (compute capability {built[0]}.{built[1]}), but this GPU is a "
            f"{device.name} ({here[0]}.{here[1]}), which it cannot run on; build it again here with espalier engine."
        )
    if record.settings.get("version_compatible"):
        runs, rule = version_numbers(version) >= version_numbers(record.tensorrt_version), "that version or a later one"
    else:
        runs, rule = version == record.tensorrt_version, "exactly that version"
    if not runs:
        raise InputError(
            f"{path} was built with TensorRT {record.tensorrt_version} and needs {rule}, but {version} is installed; "
            "build it again here with espalier engine."
        )
