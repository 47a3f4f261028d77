"""Whether a file was made for the provider that is to execute it: quantised files differ by target."""

from compress.errors import InputError
from deploy.metadata import Metadata
from deploy.runtimes.ort_providers import Provider


def wrong_pairing(about: Metadata | None, provider: Provider) -> str | None:
    """Why the file does not suit the provider, and what to do; None where it does.

    Args:
        about: what the file says about itself; None for a file of another tool, which suits every provider.
    """
    if about is None or about.target == "any":
        return None
    if about.target == "cpu" and provider.device != "cpu":
        return (
            "its activations are asymmetric uint8 for the kernels of CPUs, which TensorRT refuses and CUDA computes "
            f"in floating point; use the file of espalier export … --precision {about.precision} --target gpu"
        )
    if about.target == "gpu" and provider.device == "cpu":
        if about.precision == "fp8":
            return (
                "CPUs do not compute in fp8, so every value is converted on the way and the network runs slower than "
                "in fp32; use the file of espalier export … --precision int8 --target cpu"
            )
        return (
            "symmetric signed int8 activations run slower than fp32 on ONNX Runtime's CPU kernels (measured: 0.79x); "
            f"use the file of espalier export … --precision {about.precision} --target cpu"
        )
    return None


def require_pairing(file: str, about: Metadata | None, provider: Provider, *, for_verification: bool) -> bool:
    """Whether the file may be used for its numbers alone: a GPU's file on the CPU, asked for to verify it.

    Raises:
        InputError: it does not suit the provider; says why.
    """
    reason = wrong_pairing(about, provider)
    if reason is None:
        return False
    assert about is not None  # a file that says nothing suits every provider
    if for_verification and about.target == "gpu":
        return True
    raise InputError(f"{file} was made for the {about.target} and is not run on {provider.name}: {reason}.")
