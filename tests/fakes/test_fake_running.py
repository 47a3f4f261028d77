"""The fake computes what the network does, and finds what CUDA would not survive."""

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.fakes import cuda
from tests.fakes.fixtures import LISTINGS, install
from tests.fakes.machine import Machine
from tests.fakes.protocol import Bound, Session, bound, expected, images, network
from tests.fakes.tensorrt import build_fake, faults


@pytest.mark.parametrize(
    ("element", "tolerance"), [(TensorProto.FLOAT, 1e-5), (TensorProto.FLOAT16, 1e-2), (TensorProto.BFLOAT16, 1e-1)]
)
def test_an_engine_computes_what_its_network_does(
    session: Session, tmp_path: Path, element: int, tolerance: float
) -> None:
    run = Bound(session, session.context(session.plan(tmp_path, network(opset=22, element=element))), images())
    run.enqueue()
    np.testing.assert_allclose(run.result(), expected(network(), images()), atol=tolerance, rtol=tolerance)


def test_bfloat16_and_float8_tensors_are_read_and_written(session: Session, tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
                helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
                helper.make_node("Cast", ["d"], ["y"], name="c", to=TensorProto.BFLOAT16),
            ],
            "narrow",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
            [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [4])],
            [
                numpy_helper.from_array(np.array(1.0, np.float32), "scale"),
                helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    assert session.parse(tmp_path, model), session.parser.get_error(0).desc()
    plan = session.builder.build_serialized_network(session.network, session.config)
    context = session.context(plan)
    device = cuda.fake_cuda(Machine("NVIDIA H200", (9, 0)))(torch.device("cuda"))
    stream, x, y = device.stream(), device.put(np.float32([0.5, 1, 1.0625, 3])), device.empty((4,), torch.bfloat16)
    context.set_optimization_profile_async(0, stream.handle)
    assert context.set_tensor_address("x", x.data_ptr())
    assert context.set_tensor_address("y", y.data_ptr())
    assert context.execute_async_v3(stream.handle)
    stream.synchronize()
    assert device.take(y).astype(np.float32).tolist() == [0.5, 1, 1, 3]


def test_outputs_are_stale_until_the_stream_is_synchronised(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    run.enqueue()
    assert np.isnan(run.device.take(run.logits)).all()
    first = run.result()
    run.enqueue()
    assert np.isnan(run.device.take(run.logits)).all()
    np.testing.assert_array_equal(run.result(), first)


def test_taking_within_the_stream_waits_for_it(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    run.enqueue()
    with run.stream.inside:
        assert np.isfinite(run.device.take(run.logits)).all()


def test_the_order_of_calls_is_enforced(session: Session, tmp_path: Path) -> None:
    context = session.context(session.plan(tmp_path))
    stream = cuda.FakeStream()
    assert not context.set_input_shape("images", (1, 3, 8, 8))
    assert "No optimization profile" in session.recorder.errors[-1][1]
    assert not context.execute_async_v3(stream.handle)
    with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
        context.set_optimization_profile_async(0, 0)
    with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
        context.set_optimization_profile_async(1, stream.handle)
    assert context.set_optimization_profile_async(0, stream.handle)
    assert context.infer_shapes() == ["images"]
    assert tuple(context.get_tensor_shape("logits")) == (-1, 5)
    assert not context.execute_async_v3(stream.handle)
    assert "shapes of ['images']" in session.recorder.errors[-1][1]
    assert context.set_input_shape("images", (3, 3, 8, 8))
    assert tuple(context.get_tensor_shape("logits")) == (3, 5)
    assert not context.execute_async_v3(stream.handle)
    assert "setTensorAddress" in session.recorder.errors[-1][1]
    assert not context.execute_async_v3(0)
    assert "default stream" in session.recorder.errors[-1][1]


def test_shapes_outside_the_profile_are_refused(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    assert not run.context.set_input_shape("images", (5, 3, 8, 8))
    assert "maximum dimension in profile is 4" in session.recorder.errors[-1][1]
    assert not run.context.set_input_shape("images", (2, 3, 8))
    assert not run.context.set_input_shape("logits", (2, 5))


def test_races_are_found(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    run.enqueue()
    run.images.zero_()
    with pytest.raises(RuntimeError, match="race: input images"):
        run.stream.synchronize()
    other = cuda.FakeStream()
    run.context.set_optimization_profile_async(0, other.handle)
    with pytest.raises(RuntimeError, match="race: the profile"):
        run.context.execute_async_v3(run.stream.handle)


def test_memory_is_checked(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    assert not run.context.set_tensor_address("logits", run.logits.data_ptr() + 4)
    host = (ctypes.c_char * 4096)()
    assert run.context.set_tensor_address("logits", -(-ctypes.addressof(host) // 256) * 256)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.context.execute_async_v3(run.stream.handle)
    run.bind(images())
    run.logits = None
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.context.execute_async_v3(run.stream.handle)
    run.bind(images())
    assert run.context.set_input_shape("images", (3, 3, 8, 8))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.context.execute_async_v3(run.stream.handle)


def test_a_context_without_memory_must_be_given_some(session: Session, tmp_path: Path) -> None:
    session.context(session.plan(tmp_path))
    strategy = session.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    run = Bound(session, session.engine.create_execution_context(strategy), images())
    assert not run.context.execute_async_v3(run.stream.handle)
    assert "set_device_memory" in session.recorder.errors[-1][1]
    scratch = run.device.empty((session.engine.device_memory_size_v2,), torch.uint8)
    run.context.set_device_memory(scratch.data_ptr(), scratch.nbytes - 1)
    assert "less than" in session.recorder.errors[-1][1]
    run.context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
    run.enqueue()
    assert np.isfinite(run.result()).all()
    del scratch
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.enqueue()


def test_a_graph_replays_what_was_captured(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    with pytest.raises(RuntimeError, match="error during capture"):
        run.device.capture(run.stream, lambda: run.context.execute_async_v3(run.stream.handle) and None)
    run.enqueue()
    run.stream.synchronize()
    replay = run.device.capture(run.stream, run.enqueue)
    fresh = images(seed=2)
    run.images.copy_(torch.from_numpy(fresh))
    with pytest.raises(RuntimeError, match="another stream"):
        replay()
    with run.stream.inside:
        replay()
    np.testing.assert_allclose(run.result(), expected(network(), fresh), rtol=1e-4, atol=1e-5)
    assert run.context.set_input_shape("images", (1, 3, 8, 8))
    with run.stream.inside, pytest.raises(RuntimeError, match="the graph is stale"):
        replay()


def test_a_capture_cannot_wait(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    for work in (run.stream.synchronize, lambda: run.device.take(run.logits)):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            run.device.capture(run.stream, work)
    run.enqueue()
    assert np.isfinite(run.result()).all()


def test_copies_are_work_of_the_stream_like_any_other(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    (fresh,) = run.device.pin([images(seed=2)])
    host = run.device.pinned(run.logits.shape, torch.float32)
    with run.stream.inside:
        run.stream.copy(run.images, fresh)
        run.enqueue()
        run.stream.copy(host, run.logits)
    assert torch.isnan(host).all()
    run.stream.synchronize()
    np.testing.assert_allclose(host.numpy(), expected(network(), images(seed=2)), rtol=1e-4, atol=1e-5)


def test_copies_that_cuda_would_not_do_so(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    (pinned,) = run.device.pin([images()])
    with pytest.raises(RuntimeError, match="another stream"):
        run.stream.copy(run.images, pinned)
    with run.stream.inside:
        with pytest.raises(RuntimeError, match="page-locked"):
            run.stream.copy(run.images, torch.from_numpy(images()))
        with pytest.raises(RuntimeError, match="page-locked"):
            run.stream.copy(pinned, pinned)
        with pytest.raises(RuntimeError, match="a copy of"):
            run.stream.copy(run.images, pinned[:1])
        run.stream.copy(run.images, pinned)
        pinned.zero_()
        with pytest.raises(RuntimeError, match="race: what is copied"):
            run.stream.synchronize()


def test_events_happen_when_the_stream_comes_to_them() -> None:
    stream = cuda.FakeStream()
    before, after = stream.mark(), stream.mark()
    with pytest.raises(RuntimeError, match="not happened yet"):
        before.elapsed_time(after)
    stream.synchronize()
    assert before.elapsed_time(after) == pytest.approx(0.01)


def test_layers_are_reported_after_a_run(session: Session, tmp_path: Path) -> None:
    times: dict[str, float] = {}

    class Profiler(session.trt.IProfiler):
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = ms

    run = bound(session, tmp_path)
    profiler = Profiler()
    run.context.profiler = profiler
    run.enqueue()
    assert times == {}
    run.stream.synchronize()
    assert list(times) == ["cast_in", "conv", "relu", "mean", "flatten", "head", "cast_out"]
    times.clear()
    run.context.enqueue_emits_profile = False
    run.enqueue()
    run.stream.synchronize()
    assert times == {}
    assert run.context.report_to_profiler()
    assert len(times) == 7


def test_failures_of_a_run_are_reported(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    faults(session.trt).fail_enqueue = True
    assert not run.context.execute_async_v3(run.stream.handle)
    assert "unspecified launch failure" in session.recorder.errors[-1][1]
    faults(session.trt).out_of_memory_in_load = True
    assert session.runtime.deserialize_cuda_engine(session.engine.serialize()) is None
    assert "OutOfMemory" in session.recorder.errors[-1][1]
    session.recorder.clear()
    faults(session.trt).out_of_memory_in_context = True
    assert session.engine.create_execution_context() is None
    assert "OutOfMemory" in session.recorder.errors[-1][1]


def test_failures_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, build_fake(LISTINGS["11.4"]))
    from deploy.runtimes.cuda import CudaDevice

    device = CudaDevice(torch.device("cuda"))
    assert (device.name, device.compute_capability, device.index) == ("NVIDIA H200", (9, 0), 0)
    faults(module).fail_capture = True
    with pytest.raises(RuntimeError, match="CUDA error"):
        device.capture(device.stream(), lambda: None)
    faults(module).out_of_memory_on_device = True
    with pytest.raises(device.memory_error):
        device.empty((2,), torch.float32)


@pytest.mark.parametrize("name", ["logger", "recorder", "runtime", "engine"])
def test_what_tensorrt_points_at_must_be_kept(session: Session, tmp_path: Path, name: str) -> None:
    context = session.context(session.plan(tmp_path))
    assert tuple(context.get_tensor_shape("images")) == (-1, 3, 8, 8)
    delattr(session, name)
    gc.collect()
    with pytest.raises(RuntimeError, match="use after free"):
        context.get_tensor_shape("images")


def test_a_profiler_must_be_kept(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    run.context.profiler = session.trt.Profiler()
    with pytest.raises(RuntimeError, match="use after free: the profiler"):
        run.context.execute_async_v3(run.stream.handle)
    run.context.profiler = None
    run.enqueue()


def test_a_context_must_outlive_its_work(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    run.enqueue()
    run.context = None
    gc.collect()
    with pytest.raises(RuntimeError, match="use after free: an execution context"):
        run.stream.synchronize()


def test_a_stream_must_be_kept(session: Session, tmp_path: Path) -> None:
    run = bound(session, tmp_path)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        run.context.execute_async_v3(cuda.FakeStream().handle)
