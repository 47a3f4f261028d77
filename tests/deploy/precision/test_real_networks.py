"""All precisions of networks that people use, dense and pruned to half their MACs, with random weights."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn.functional import cross_entropy

from compress import Budget, Pruner, models
from deploy.export import export_onnx
from deploy.onnx_file import read_onnx
from deploy.precision import Precision, Target
from deploy.precision.calibration import calibrate
from deploy.precision.half import to_half
from deploy.precision.quantisation import quantise

pytestmark = pytest.mark.slow

NETWORKS = {
    "torchvision:resnet18": (3, 64, 64),
    "torchvision:mobilenet_v3_small": (3, 64, 64),
    "espalier:resnet20": (3, 32, 32),
}
BOUNDS = {"int8": 0.1, "fp8": 0.25}
"""Random weights spread the logits little, so errors are large against them; what is wrong is off by more than 1."""

KINDS: list[tuple[Precision, Target]] = [("int8", "cpu"), ("int8", "gpu"), ("fp8", "gpu")]


def images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((32, *shape)).astype(np.float32)


@pytest.fixture(scope="module", params=[(name, kept) for name in NETWORKS for kept in (1.0, 0.5)], ids=str)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, kept = request.param
    torch.manual_seed(0)
    model = models.build(name)
    model.train()
    if kept < 1:
        pruner = Pruner(
            model, torch.zeros(2, *NETWORKS[name]), budget=Budget(macs=kept), events=1, interval=1, round_to=8
        )
        batch = torch.from_numpy(images(NETWORKS[name], 9)[:8])
        cross_entropy(model(batch), torch.arange(8)).backward()
        pruner.step()
    with torch.no_grad():  # statistics of the batch normalisations that fit the images
        for seed in range(3):
            model(torch.from_numpy(images(NETWORKS[name], seed)))
    folder = tmp_path_factory.mktemp("network")
    return export_onnx(model.eval(), folder / f"{name}.onnx", image_shape=NETWORKS[name])


def shape(source: Path) -> tuple[int, ...]:
    return NETWORKS[source.stem]


def logits(path: Path, batch: np.ndarray, *, plain: bool = False) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if plain:  # ONNX Runtime's optimiser takes Relu out before QuantizeLinear to fp8, and lets MaxPool take fp8
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    wanted = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return session.run(None, {"images": batch.astype(wanted)})[0].astype(np.float64)


def error(source: Path, path: Path, *, plain: bool = False) -> float:
    """Mean difference of the logits over the mean absolute logit."""
    batch = images(shape(source), 5)
    expected, actual = logits(source, batch), logits(path, batch, plain=plain)
    return float(np.abs(actual - expected).mean() / np.abs(expected).mean())


@pytest.mark.parametrize("fp32_io", [False, True])
def test_half_precision_is_valid_and_near(source: Path, tmp_path: Path, fp32_io: bool) -> None:
    pytest.importorskip("modelopt", reason="needs the extra quant")
    samples = images(shape(source), 1)
    for precision in ("fp16", "bf16"):  # the files are checked strictly when they are written
        path = tmp_path / f"{precision}.onnx"
        to_half(source, path, precision, fp32_io=fp32_io, samples=samples)
    assert read_onnx(path).opset_import[0].version == 22
    assert error(source, tmp_path / "fp16.onnx") < 2e-3


@pytest.mark.parametrize(("precision", "target"), KINDS)
def test_quantised_files_are_valid_and_near(source: Path, tmp_path: Path, precision: Precision, target: Target) -> None:
    ranges = calibrate(source, images(shape(source), 1), target=target)
    path = tmp_path / "q.onnx"
    quantise(source, path, precision=precision, target=target, ranges=ranges)
    assert error(source, path, plain=precision == "fp8") < BOUNDS[precision]


def test_every_convolution_runs_in_an_integer_kernel_on_the_cpu(source: Path, tmp_path: Path) -> None:
    path, optimised = tmp_path / "q.onnx", tmp_path / "optimised.onnx"
    ranges = calibrate(source, images(shape(source), 1), target="cpu")
    quantise(source, path, precision="int8", target="cpu", ranges=ranges)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 3
    onnxruntime.InferenceSession(str(path), options)
    operators = [node.op_type for node in onnx.load(optimised).graph.node]
    convolutions = [node for node in read_onnx(source).graph.node if node.op_type == "Conv"]
    assert operators.count("QLinearConv") == len(convolutions)
    assert operators.count("Conv") == operators.count("FusedConv") == operators.count("Gemm") == 0
