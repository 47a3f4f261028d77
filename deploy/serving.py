"""Which runtime a run is verified and timed on: TensorRT where it can be had, else ONNX Runtime; and why."""

import importlib.util
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

from compress.errors import InputError
from deploy.precision import Precision, Target
from deploy.tensorrt_binding import import_tensorrt

_NOT_ON_CPU: Final[dict[Precision, str]] = {
    "bf16": "ONNX Runtime has no bf16 kernels for the CPU",
    "fp8": "no CPU computes in fp8",
}


class Serving(BaseModel):
    """The runtime and device of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: Literal["tensorrt", "onnxruntime"]
    device: Literal["cpu", "cuda"]
    reason: str
    """Why this one, as a clause."""

    @property
    def target(self) -> Target:
        """What quantised files are made for."""
        return "cpu" if self.device == "cpu" else "gpu"

    def __str__(self) -> str:
        name = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime"}[self.runtime]
        return f"{name} on {'the CPU' if self.device == 'cpu' else 'the GPU'}, because {self.reason}"

    def require(self, precisions: tuple[Precision, ...]) -> None:
        """Refuse precisions that the runtime cannot execute.

        Raises:
            InputError: names the first of them.
        """
        for precision in precisions:
            if self.device == "cpu" and precision in _NOT_ON_CPU:
                raise InputError(
                    f"export.precision names {precision}, but this run uses {self}, and {_NOT_ON_CPU[precision]}: "
                    "leave it out here, and write the file with espalier export."
                )


def choose() -> Serving:
    """The best runtime of this machine."""
    if not torch.cuda.is_available():
        return Serving(runtime="onnxruntime", device="cpu", reason="PyTorch finds no CUDA GPU")
    try:
        import_tensorrt("Building engines")
    except InputError as error:
        missing = str(error).partition(":")[0]
    else:
        return Serving(runtime="tensorrt", device="cuda", reason="a CUDA GPU and TensorRT are present")
    if _cuda_provider():
        return Serving(
            runtime="onnxruntime", device="cuda", reason=f"a CUDA GPU is present, but TensorRT is not used: {missing}"
        )
    return Serving(
        runtime="onnxruntime",
        device="cpu",
        reason=f"TensorRT is not used ({missing}) and the installed onnxruntime has no CUDA provider",
    )


def _cuda_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
