"""Matrix products to measure a peak with: by PyTorch, and on the CPU by ONNX Runtime too, which runs our int8 networks.

Which library has the fastest kernel differs by type. On an AMD EPYC with AVX-512 VNNI and 2 threads, in 10⁹ MACs per
second: int8 `torch._int_mm` 820, ONNX Runtime's `MatMulInteger` of unsigned by signed bytes 470, of signed by signed 23
(so it is no candidate); float16 `torch.mm` 0.5, by its fallback loop, and ONNX Runtime, which converts to float32, 60.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

Step = Callable[[], Any]


@dataclass(frozen=True)
class Product:
    """A way to multiply two square matrices: `make(n)` gives the step that does it once."""

    name: str
    make: Callable[[int], Step]


def products(dtype: str, place: torch.device, threads: int) -> list[Product]:
    """All ways known for a type on a device; one that the device lacks raises when it is made or called."""
    if dtype == "int8":
        found = [Product("torch._int_mm", partial(_torch_int8, place))]
    elif dtype == "float8":
        found = [Product("torch._scaled_mm", partial(_torch_float8, place))]
    else:
        found = [Product("torch.mm", partial(_torch_float, place, getattr(torch, dtype)))]
    operators = {"float32": "MatMul", "float16": "MatMul", "int8": "MatMulInteger"}
    if place.type == "cpu" and dtype in operators and find_spec("onnxruntime") is not None:
        operator = operators[dtype]
        found.append(Product(f"ONNX Runtime {operator}", partial(_onnxruntime, operator, dtype, threads)))
    return found


def _torch_float(place: torch.device, dtype: torch.dtype, size: int) -> Step:
    left, right = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
    result = torch.empty(size, size, device=place, dtype=dtype)

    def step() -> None:
        torch.mm(left, right, out=result)

    if place.type != "cuda" or dtype != torch.float32:
        return step

    def full_precision() -> None:  # fp32 is fp32: not rounded to TF32
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        step()
        torch.set_float32_matmul_precision(before)

    return full_precision


def _torch_int8(place: torch.device, size: int) -> Step:
    left, right = (torch.randint(-127, 127, (size, size), device=place, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(left, right)


def _torch_float8(place: torch.device, size: int) -> Step:
    if place.type != "cuda":
        raise RuntimeError("CPUs do not compute in float8")
    left, right = (torch.randn(size, size, device=place).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=place)
    return lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _onnxruntime(operator: str, dtype: str, threads: int, size: int) -> Step:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).integers(-127, 127, (size, size)).astype(dtype)
    left = np.ones((size, size), "uint8" if dtype == "int8" else dtype)
    given = helper.np_dtype_to_tensor_dtype(left.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", given, left.shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32 if dtype == "int8" else given, left.shape)],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        raise RuntimeError(str(error)) from error
    return lambda: session.run(None, {"a": left})
