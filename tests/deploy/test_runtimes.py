import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import nn

from compress.errors import InputError, MissingExtraError, WorkError
from deploy.runtimes import RUNTIMES, Runtime, TensorSpec, open_runtime

# (N, 1, 1, 2) -> (N, 2): the two pixels a, b become a + 3b and 2a + 4b.
NETWORK = """
<ir_version: 10, opset_import: ["" : 20]>
network (float[batch, 1, 1, 2] images) => (float[batch, 2] logits)
<float[2, 2] weight = {1, 2, 3, 4}, int64[2] shape = {-1, 2}>
{
    pixels = Reshape(images, shape)
    logits = MatMul(pixels, weight)
}
"""


class Linear(nn.Module):
    """The same network in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(images.flatten(1)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    onnx.save(onnx.parser.parse_model(NETWORK), path)
    return path


@pytest.fixture(params=["onnxruntime", "pytorch"])
def runtime(request: pytest.FixtureRequest, path: Path) -> Runtime:
    return open_runtime(path if request.param == "onnxruntime" else Linear(), threads=1)


def images(*pixels: tuple[float, float]) -> dict[str, np.ndarray]:
    return {"images": np.array(pixels, np.float32).reshape(-1, 1, 1, 2)}


def test_logits_by_hand(runtime: Runtime) -> None:
    for batch in (images((1, 0)), images((1, 0), (0, 1), (1, 2))):
        outputs = runtime.run(batch)
        assert list(outputs) == ["logits"]
        expected = [[a + 3 * b, 2 * a + 4 * b] for a, b in batch["images"].reshape(-1, 2)]
        np.testing.assert_array_equal(outputs["logits"], np.array(expected, np.float32))


def test_input_that_is_not_contiguous(runtime: Runtime) -> None:
    batch = np.array([[1, 9, 2, 9]], np.float32).reshape(1, 1, 1, 4)[..., ::2]
    np.testing.assert_array_equal(runtime.run({"images": batch})["logits"], [[7, 10]])
    step = runtime.bind({"images": batch})
    step()
    np.testing.assert_array_equal(step.outputs()["logits"], [[7, 10]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"pictures": np.zeros((1, 1, 1, 2), np.float32)},
            "given are pictures, but the network takes images",
        ),
        ({}, "given are nothing"),
        (
            {"images": np.zeros((1, 1, 1, 2), np.float64)},
            r'dtype float64.*takes float32.*astype\("float32"\)',
        ),
        ({"images": np.zeros((1, 2), np.float32)}, r"shape \(1, 2\)"),
        ({"images": np.zeros((0, 1, 1, 2), np.float32)}, r"shape \(0, 1, 1, 2\)"),
        ({"images": torch.zeros(1, 1, 1, 2)}, "is a Tensor, but a NumPy array"),
    ],
)
def test_wrong_input_is_refused(runtime: Runtime, batch: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.run(batch)
    with pytest.raises(InputError, match=message):
        runtime.bind(batch)


def test_wrong_fixed_size_is_refused_with_the_spec(path: Path) -> None:
    with pytest.raises(InputError, match=r"\(1, 1, 1, 3\).*images: float32 \(batch, 1, 1, 2\)"):
        open_runtime(path).run({"images": np.zeros((1, 1, 1, 3), np.float32)})


def test_bound_step_equals_run(runtime: Runtime) -> None:
    batch = images((1, 0), (0, 1), (1, 2))
    step = runtime.bind(batch)
    step()
    np.testing.assert_array_equal(step.outputs()["logits"], runtime.run(batch)["logits"])


def test_bound_step_writes_into_the_same_memory_each_time(path: Path) -> None:
    batch = images((1, 0))
    step = open_runtime(path).bind(batch)
    step()
    first = step.outputs()["logits"]
    address = first.ctypes.data
    batch["images"][:] = 10  # bound, not copied: the next call reads the new pixels into the old buffer
    step()
    np.testing.assert_array_equal(first, [[40, 60]])
    assert step.outputs()["logits"].ctypes.data == address


def test_specs_of_a_file(path: Path) -> None:
    runtime = open_runtime(path)
    assert runtime.inputs == (TensorSpec("images", "float32", ("batch", 1, 1, 2)),)
    assert runtime.outputs == (TensorSpec("logits", "float32", ("batch", 2)),)


def test_description_proves_the_provider_and_leaves_no_profile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    description = open_runtime(path, threads=1).description()
    assert description["runtime"] == "onnxruntime"
    assert description["version"] == onnxruntime.__version__
    assert description["threads"] == 1
    assert description["kernels_by_provider"] == {"CPUExecutionProvider": 2}
    assert [item.name for item in tmp_path.iterdir()] == ["network.onnx"]


def test_threads_default_to_those_of_pytorch(path: Path) -> None:
    assert open_runtime(path).description()["threads"] == torch.get_num_threads()
    assert open_runtime(Linear()).description()["threads"] == torch.get_num_threads()


def test_module_is_in_eval_mode_until_closed() -> None:
    model = Linear().train()
    model.linear.eval()
    with open_runtime(model) as runtime:
        assert not model.training
        assert not model.dropout.training
        assert runtime.description()["version"] == torch.__version__
    assert (model.training, model.dropout.training, model.linear.training) == (True, True, False)


def test_closed_runtime_is_refused(runtime: Runtime) -> None:
    runtime.close()
    runtime.close()
    with pytest.raises(InputError, match="closed"):
        runtime.run(images((1, 0)))


def test_module_that_fails_or_returns_no_tensor() -> None:
    with pytest.raises(WorkError, match=r"PyTorch failed on a batch of shape \(1, 1, 1, 3\)"):
        open_runtime(Linear()).run({"images": np.zeros((1, 1, 1, 3), np.float32)})

    class Tuple(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images

    with pytest.raises(InputError, match="returned a tuple"):
        open_runtime(Tuple()).run(images((1, 0)))


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_cut_off_file_is_named(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"network\.onnx is not a readable ONNX file.*export it again"):
        open_runtime(path)


def test_file_with_an_unknown_operator_is_named(path: Path) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("MatMul", "MutMal")), path)
    with pytest.raises(InputError, match=r"network\.onnx.*MutMal"):
        open_runtime(path)


def test_failure_inside_onnx_runtime_is_a_work_error(path: Path) -> None:
    # Reshape to rows of four fails for one image, which the input spec cannot foresee.
    onnx.save(onnx.parser.parse_model(NETWORK.replace("shape = {-1, 2}", "shape = {4, -1}")), path)
    with pytest.raises(WorkError, match=r"ONNX Runtime failed on network\.onnx"):
        open_runtime(path).run(images((1, 0)))


def test_dynamic_image_size_cannot_be_proved(path: Path) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("1, 1, 2] images", "1, height, 2] images")), path)
    with pytest.raises(InputError, match="dynamic dimension besides the batch"):
        open_runtime(path).description()


def test_missing_file_unknown_suffix_and_no_threads(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        open_runtime(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match=r"model\.pt has the suffix \.pt.*\.onnx"):
        open_runtime(tmp_path / "model.pt")
    with pytest.raises(InputError, match="0 threads"):
        open_runtime(path, threads=0)


def test_table_can_be_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.plan").touch()
    monkeypatch.setitem(RUNTIMES, ".plan", lambda path, device, threads: SimpleNamespace(path=path))
    assert open_runtime(tmp_path / "model.plan").path == tmp_path / "model.plan"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_refused(path: Path, device: str) -> None:
    for artefact in (path, Linear()):
        with pytest.raises(InputError, match=f"Device {device} was asked for"):
            open_runtime(artefact, device=device)


def test_cuda_with_the_cpu_build_of_onnxruntime_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=r"CUDAExecutionProvider.*espalier\[gpu\]"):
        open_runtime(path, device="cuda")


def test_cuda_that_silently_became_cpu_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    original = onnxruntime.InferenceSession

    def fallen_back(file: str, options: object, providers: list) -> object:
        assert providers == [("CUDAExecutionProvider", {"device_id": "0"})]
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        return original(file, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(InputError, match="CUDAExecutionProvider did not start"):
        open_runtime(path, device="cuda")


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_unknown_device_is_refused(path: Path, device: str) -> None:
    with pytest.raises(InputError, match=device):
        open_runtime(path, device=device)


def test_missing_onnxruntime_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[cpu\]"):
        open_runtime(path)
