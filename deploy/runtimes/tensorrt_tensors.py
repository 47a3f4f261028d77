"""Inputs and outputs of a TensorRT engine, as the engine itself gives them."""

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import InputError
from deploy.manifest import Profile
from deploy.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class EngineTensors:
    """Inputs and outputs, the types of all by name, and the shapes that each input may have."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtypes: dict[str, torch.dtype]
    profiles: dict[str, Profile]
    """Of optimisation profile 0."""


def read_tensors(trt: ModuleType, engine: "tensorrt.ICudaEngine", file: str) -> EngineTensors:
    """What goes into the engine and comes out of it; `file` names it in errors.

    Raises:
        InputError: one of them cannot be bound to memory of the GPU as a PyTorch tensor.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    dtypes = {name: _dtype(trt, engine, name, file) for name in names}
    specs = {name: TensorSpec(name, str(dtypes[name]).removeprefix("torch."), _shape(engine, name)) for name in names}
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return EngineTensors(
        inputs=tuple(specs[name] for name in inputs),
        outputs=tuple(specs[name] for name in names if name not in inputs),
        dtypes=dtypes,
        profiles={name: _profile(engine, name) for name in inputs},
    )


def _shape(engine: "tensorrt.ICudaEngine", name: str) -> tuple[int | str | None, ...]:
    sizes = tuple(engine.get_tensor_shape(name))
    return tuple(size if size >= 0 else None if axis else "batch" for axis, size in enumerate(sizes))


def _profile(engine: "tensorrt.ICudaEngine", name: str) -> Profile:
    minimum, optimum, maximum = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    return Profile(minimum=minimum, optimum=optimum, maximum=maximum)


def _dtype(trt: ModuleType, engine: "tensorrt.ICudaEngine", name: str, file: str) -> torch.dtype:
    kind = engine.get_tensor_dtype(name)
    dtypes: dict[Any, torch.dtype] = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }
    on_gpu = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
    if kind not in dtypes or not on_gpu:
        raise InputError(
            f"{file}: {name} is a tensor of type {kind} in {'GPU' if on_gpu else 'CPU'} memory, which cannot be bound; "
            "export the network with float32 inputs and outputs."
        )
    return dtypes[kind]
