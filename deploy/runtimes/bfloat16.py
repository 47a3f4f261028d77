"""bfloat16 between libraries: NumPy has it by ml_dtypes, which neither PyTorch nor ONNX Runtime takes as it is."""

import ctypes
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx

if TYPE_CHECKING:
    import torch

BFLOAT16: Final[np.dtype] = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
"""NumPy's dtype of that name; it is known by name, too, once this module is imported."""


def to_torch(array: np.ndarray) -> "torch.Tensor":
    """The array as a tensor on the CPU that shares its memory."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """The tensor as an array; one on the CPU shares its memory."""
    import torch

    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def to_ort(ort: Any, array: np.ndarray, place: tuple[str, int]) -> Any:
    """The array as an OrtValue; on the CPU it shares the array's memory, so keep the array alive.

    Args:
        ort: the module onnxruntime.
        place: kind and number of the device, ("cuda", 0).
    """
    if array.dtype != BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array, *place)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
    if place[0] == "cpu":
        return value
    there = empty_in_ort(ort, array.shape, array.dtype, place)
    there.update_inplace(value)
    return there


def empty_in_ort(ort: Any, shape: tuple[int, ...], dtype: np.dtype, place: tuple[str, int]) -> Any:
    """An OrtValue of that shape and type whose content is arbitrary."""
    element = onnx.TensorProto.BFLOAT16 if dtype == BFLOAT16 else dtype
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, *place)


def from_ort(ort: Any, value: Any) -> np.ndarray:
    """An OrtValue as an array; one on the CPU shares its memory."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = tuple(value.shape())
    if value.device_name().lower() != "cpu":
        here = empty_in_ort(ort, shape, BFLOAT16, ("cpu", 0))
        here.update_inplace(value)
        value = here
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    words.owner = value  # the array keeps its memory, and with it the OrtValue
    return np.ctypeslib.as_array(words).view(BFLOAT16).reshape(shape)
