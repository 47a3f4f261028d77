"""Building engines under strict fakes of both majors."""

import errno
import json
import logging
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn

from compress.errors import InputError, WorkError
from deploy import manifest
from deploy.engine import BatchRange, BuilderSettings, build_engine, read_builder_settings
from deploy.export import export_onnx
from deploy.metadata import Metadata, Quantisation, write_metadata
from deploy.trust import trusted_plan
from tests.fakes.fixtures import install
from tests.fakes.plan import CACHE_MAGIC, Plan, decode
from tests.fakes.tensorrt import build_fake, faults

pytestmark = pytest.mark.usefixtures("tensorrt")
LISTINGS = {path.stem: path for path in (Path(__file__).parents[1] / "fakes" / "listings").glob("*.json")}
BATCH = BatchRange(minimum=1, optimum=4, maximum=8)

QUANTISED = """
<ir_version: 10, opset_import: ["" : 20]>
network (float[batch, 3, 8, 8] images) => (float[batch, 3, 8, 8] logits)
<float scale = {0.5}, TYPE zero = {0}>
{
    quantised = QuantizeLinear(images, scale, zero)
    logits = DequantizeLinear(quantised, scale, zero)
}
"""


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    path = tmp_path_factory.mktemp("export") / "net.fp32.onnx"
    return export_onnx(model, path, image_shape=(3, 8, 8), checkpoint_digest="ab" * 32)


@pytest.fixture
def onnx_path(exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / "artifacts" / exported.name
    path.parent.mkdir()
    path.write_bytes(exported.read_bytes())
    return path


def build(path: Path, *, batch: BatchRange = BATCH, plan: Path | None = None, **settings: Any) -> manifest.Entry:
    return build_engine(path, plan or path.with_suffix(".plan"), batch=batch, settings=BuilderSettings(**settings))


def header_of(plan: Path) -> Any:
    return Plan.decode(plan.read_bytes()).header


def text_model(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_engine_stands_in_the_manifest_and_is_trusted(onnx_path: Path, tensorrt: ModuleType) -> None:
    entry = build(onnx_path)
    plan = onnx_path.with_suffix(".plan")
    assert plan.name == "net.fp32.plan"
    assert entry == manifest.read(plan.parent).entry("net.fp32.plan")
    assert (entry.kind, entry.precision, entry.target) == ("plan", "fp32", "any")
    assert entry.checkpoint_sha256 == "ab" * 32
    assert entry.source_sha256 == manifest.sha256(onnx_path)
    assert [str(spec) for spec in (*entry.inputs, *entry.outputs)] == [
        "images: float32 (batch, 3, 8, 8)",
        "logits: float32 (batch, 5)",
    ]
    assert entry.engine == manifest.EngineRecord(
        tensorrt_version=tensorrt.__version__,
        gpu="NVIDIA H200",
        compute_capability=(9, 0),
        profiles={"images": manifest.Profile(minimum=(1, 3, 8, 8), optimum=(4, 3, 8, 8), maximum=(8, 3, 8, 8))},
        settings=BuilderSettings().model_dump(mode="json"),
    )
    assert entry.engine.settings["tf32"] is False
    assert trusted_plan(plan) == (plan.read_bytes(), entry)


def test_settings_reach_the_builder_and_the_manifest(onnx_path: Path) -> None:
    given = {
        "workspace_bytes": 2**30,
        "optimization_level": 5,
        "tf32": True,
        "version_compatible": True,
        "hardware_compatible": "ampere-plus",
        "refittable": True,
    }
    entry = build(onnx_path, **given)
    header = header_of(onnx_path.with_suffix(".plan"))
    assert (header.workspace_bytes, header.optimization_level, header.tf32) == (2**30, 5, True)
    assert (header.version_compatible, header.hardware_compatibility) == (True, "AMPERE_PLUS")
    assert (header.refittable, header.verbosity) == (True, "DETAILED")
    assert entry.engine is not None
    assert entry.engine.settings == {**given, "timing_cache": None}


@pytest.mark.parametrize(
    ("level", "name"),
    [("none", "NONE"), ("same-compute-capability", "SAME_COMPUTE_CAPABILITY"), ("ampere-plus", "AMPERE_PLUS")],
)
def test_hardware_compatibility_by_name(onnx_path: Path, level: Any, name: str) -> None:
    build(onnx_path, hardware_compatible=level)
    assert header_of(onnx_path.with_suffix(".plan")).hardware_compatibility == name


def test_defaults_of_the_builder(onnx_path: Path) -> None:
    build_engine(onnx_path, onnx_path.with_suffix(".plan"), batch=BATCH)
    header = header_of(onnx_path.with_suffix(".plan"))
    assert (header.workspace_bytes, header.optimization_level, header.tf32) == (None, 3, False)
    assert header.profiles == ({"images": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))},)


def test_timing_cache_is_saved_and_used_again(onnx_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "timing.cache"
    build(onnx_path, timing_cache=cache)
    first, _ = decode(CACHE_MAGIC, cache.read_bytes())
    assert first["entries"]
    other = text_model(tmp_path / "other.onnx", QUANTISED.replace("TYPE", "int8"))
    build(other, timing_cache=cache)
    second, _ = decode(CACHE_MAGIC, cache.read_bytes())
    assert second["entries"].items() > first["entries"].items()
    assert [item.name for item in cache.parent.iterdir()] == ["timing.cache"]


@pytest.mark.parametrize("what", ["damaged", "of another GPU"])
def test_timing_cache_of_no_use_is_replaced(
    onnx_path: Path,
    tmp_path: Path,
    what: str,
    tensorrt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "timing.cache"
    build(onnx_path, timing_cache=cache)
    good = cache.read_bytes()
    if what == "damaged":
        cache.write_bytes(good[:-3])
    else:
        other = build_fake(LISTINGS[tensorrt.__version__], gpu="NVIDIA L4", compute_capability=(8, 9))
        install(monkeypatch, other)
    with caplog.at_level(logging.WARNING, "deploy.engine"):
        build(onnx_path, timing_cache=cache)
    assert f"the timing cache {cache} is damaged, or of another GPU or TensorRT" in caplog.text
    header, _ = decode(CACHE_MAGIC, cache.read_bytes())
    assert header["entries"]
    assert header["origin"]["gpu"] == ("NVIDIA H200" if what == "damaged" else "NVIDIA L4")


def test_a_useless_timing_cache_is_not_the_reason_of_a_later_failure(
    onnx_path: Path,
    tmp_path: Path,
    tensorrt: ModuleType,
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"no cache")
    faults(tensorrt).fail_build = True
    with pytest.raises(WorkError, match="Could not find any implementation for node"):
        build(onnx_path, timing_cache=cache)
    assert cache.read_bytes() == b"no cache"


def test_timing_cache_that_cannot_be_read(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read the timing cache .*: Is a directory; name another file"):
        build(onnx_path, timing_cache=tmp_path)


def test_failed_build_quotes_the_first_error_and_leaves_nothing(onnx_path: Path, tensorrt: ModuleType) -> None:
    faults(tensorrt).fail_build = True
    with pytest.raises(
        WorkError, match=r"TensorRT could not build .*net\.fp32\.onnx: .*Could not find any implementation"
    ):
        build(onnx_path)
    assert [item.name for item in onnx_path.parent.iterdir()] == ["net.fp32.onnx"]


def test_out_of_memory_while_building_gives_advice(onnx_path: Path, tensorrt: ModuleType) -> None:
    faults(tensorrt).out_of_memory_in_build = True
    with pytest.raises(
        WorkError, match=r"ran out of GPU memory.*out of memory.*less --workspace or a smaller largest batch"
    ):
        build(onnx_path)


@pytest.mark.parametrize("written_before", [False, True])
def test_interrupted_build_leaves_what_was_there(
    onnx_path: Path,
    written_before: bool,
    tensorrt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = onnx_path.with_suffix(".plan")
    before = {}
    if written_before:
        build(onnx_path)
        before = {path.name: path.read_bytes() for path in plan.parent.iterdir()}
    original = tensorrt.IProgressMonitor
    steps = []

    class Interrupting(original):  # type: ignore[valid-type, misc]
        def __init_subclass__(cls) -> None:
            inner = cls.step_complete

            def step_complete(self: Any, phase: str, step: int) -> bool:
                steps.append(step)
                signal.raise_signal(signal.SIGINT)
                return inner(self, phase, step)

            cls.step_complete = step_complete

    monkeypatch.setattr(tensorrt, "IProgressMonitor", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        build(onnx_path)
    assert len(steps) == 1  # the first step after the interrupt was the last
    left = {path.name: path.read_bytes() for path in plan.parent.iterdir()}
    assert left == (before or {"net.fp32.onnx": onnx_path.read_bytes()})


def test_unsupported_operators_are_all_named(tmp_path: Path) -> None:
    path = text_model(
        tmp_path / "net.onnx",
        """
        <ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
        network (float[batch, 3, 8, 8] images) => (float[batch, 3, 8, 8] logits)
        { a = mine.Blur(images)  b = Bernoulli(a)  logits = Relu(b) }
        """,
    )
    model = onnx.load(path)
    model.graph.node[0].name, model.graph.node[1].name = "blur", "noise"
    onnx.save(model, path)
    with pytest.raises(
        InputError, match=r"node blur \(Blur\): .*; node noise \(Bernoulli\): .*; change the model.*ONNX Runtime"
    ):
        build(path)


def test_unsupported_opset(tmp_path: Path) -> None:
    path = text_model(tmp_path / "net.onnx", QUANTISED.replace("TYPE", "int8").replace('"" : 20', '"" : 25'))
    with pytest.raises(InputError, match=r"TensorRT \d.* cannot build .*net\.onnx: Unsupported ONNX opset 25"):
        build(path)


def test_file_made_for_the_cpu_is_refused_with_the_reason(onnx_path: Path) -> None:
    model = onnx.load(onnx_path)
    about = metadata(precision="int8", target="cpu")
    write_metadata(model, about)
    onnx.save(model, onnx_path)
    with pytest.raises(InputError, match=r"made for the CPU.*unsigned and asymmetric.*--precision int8 --target gpu"):
        build(onnx_path)


def metadata(**fields: Any) -> Metadata:
    return Metadata(
        version="0",
        torch_version="2",
        image_shape=(3, 8, 8),
        classes=(),
        mean=(),
        std=(),
        checkpoint_sha256="",
        other={},
        **fields,
    )


def test_what_the_metadata_say_reaches_the_manifest(tmp_path: Path) -> None:
    path = text_model(tmp_path / "net.int8.gpu.onnx", QUANTISED.replace("TYPE", "int8"))
    model = onnx.load(path)
    quantisation = Quantisation(calibration="minmax", data="digits", samples=64, excluded=("head",))
    write_metadata(model, metadata(precision="int8", target="gpu", quantisation=quantisation))
    onnx.save(model, path)
    entry = build(path)
    assert (entry.file, entry.precision, entry.target) == ("net.int8.gpu.plan", "int8", "gpu")
    assert entry.quantisation == quantisation


def test_files_of_other_tools_are_taken_by_their_types(tmp_path: Path) -> None:
    quantised = text_model(tmp_path / "a.onnx", QUANTISED.replace("TYPE", "int8"))
    assert build(quantised).precision == "int8"
    assert build(text_model(tmp_path / "b.onnx", QUANTISED.replace("TYPE", "float8e4m3fn"))).precision == "fp8"
    for kind, precision in (("float", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")):
        text = """
        <ir_version: 10, opset_import: ["" : 20]>
        network (TYPE[batch, 2] images) => (TYPE[batch, 2] logits) <TYPE[2, 2] w = {1, 2, 3, 4}>
        { logits = MatMul(images, w) }
        """
        assert build(text_model(tmp_path / f"{precision}.onnx", text.replace("TYPE", kind))).precision == precision


@pytest.mark.parametrize("declared", ["with a zero point", "without"])
def test_unsigned_quantisation_of_other_tools_is_refused(tmp_path: Path, declared: str) -> None:
    text = QUANTISED.replace("TYPE", "uint8")
    if declared == "without":
        text = text.replace(", zero)", ")")
    with pytest.raises(InputError, match=r"quantised to unsigned integers.*--target gpu"):
        build(text_model(tmp_path / "net.onnx", text))


def test_dimensions_besides_the_batch_must_be_fixed(tmp_path: Path) -> None:
    path = text_model(
        tmp_path / "net.onnx", QUANTISED.replace("TYPE", "int8").replace("8, 8] images", "height, 8] images")
    )
    with pytest.raises(
        InputError, match=r"images: float32 \(batch, 3, height, 8\) has a dynamic dimension besides the batch"
    ):
        build(path)


def test_fixed_batch(tmp_path: Path) -> None:
    path = text_model(tmp_path / "net.onnx", QUANTISED.replace("TYPE", "int8").replace("batch,", "4,"))
    with pytest.raises(InputError, match=r"has a fixed batch.*an engine for 1:4:8 was asked for.*--batch 4:4:4"):
        build(path)
    build(path, batch=BatchRange.parse("4:4:4"))


def test_damaged_or_missing_file(onnx_path: Path) -> None:
    onnx_path.write_bytes(onnx_path.read_bytes()[:40])
    with pytest.raises(InputError, match="is not a readable ONNX file"):
        build(onnx_path)
    onnx_path.unlink()
    with pytest.raises(InputError, match="Cannot read"):
        build(onnx_path)


def test_disk_full_leaves_the_old_engine(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(onnx_path)
    before = {path.name: path.read_bytes() for path in onnx_path.parent.iterdir()}
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        original(self, bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WorkError, match=r"Writing .*net\.fp32\.plan failed: No space left on device; free some space"):
        build(onnx_path, tf32=False)
    assert {path.name: path.read_bytes() for path in onnx_path.parent.iterdir()} == before


def test_folder_that_cannot_be_made_is_known_before_the_build(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.engine._build", lambda *_: pytest.fail("it was built in vain"))
    with pytest.raises(InputError, match="Cannot create the directory"):
        build(onnx_path, plan=onnx_path / "net.plan")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"Cannot write .*net\.fp32\.plan: no permission"):
        build(onnx_path)


def test_name_must_end_in_plan(onnx_path: Path) -> None:
    with pytest.raises(InputError, match=r"net\.engine does not end in \.plan.*name it net\.plan"):
        build(onnx_path, plan=onnx_path.with_name("net.engine"))


def test_device_must_be_a_gpu(onnx_path: Path) -> None:
    with pytest.raises(InputError, match="cpu"):
        build_engine(onnx_path, onnx_path.with_suffix(".plan"), batch=BATCH, device="cpu")


def test_batch_ranges() -> None:
    assert BatchRange.parse("1:8:32") == BatchRange(minimum=1, optimum=8, maximum=32)
    assert str(BatchRange.parse(" 2:2:2 ")) == "2:2:2"
    for text in ("", "8", "1:2", "0:1:2", "1:2:3:4", "a:b:c", "-1:2:3", "1:8:32x", "1:8:٣"):
        with pytest.raises(InputError, match=r"is no range of batch sizes.*1:8:32"):
            BatchRange.parse(text)
    with pytest.raises(InputError, match=r"8:4:16 is not in ascending order"):
        BatchRange.parse("8:4:16")


def test_settings_from_the_command_line() -> None:
    assert read_builder_settings(workspace="512MiB", tf32=True) == BuilderSettings(workspace_bytes=2**29, tf32=True)
    assert read_builder_settings(workspace="4096").workspace_bytes == 4096
    assert read_builder_settings(workspace=None).workspace_bytes is None
    for text in ("", "4GB", "0", "-1GiB", "1.5GiB", "GiB"):
        with pytest.raises(InputError, match=r"--workspace .* is no size.*as in 4GiB"):
            read_builder_settings(workspace=text)
    with pytest.raises(InputError, match=r"--hardware-compatible cannot be 'turing'"):
        read_builder_settings(workspace=None, hardware_compatible="turing")


def test_settings_are_json(onnx_path: Path, tmp_path: Path) -> None:
    entry = build(onnx_path, timing_cache=tmp_path / "timing.cache")
    assert entry.engine is not None
    assert json.loads(json.dumps(entry.engine.settings))["timing_cache"] == str(tmp_path / "timing.cache")
