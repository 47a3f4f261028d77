"""Model repositories, read back with Triton's own protobuf."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from made_runs import GPU, MadeRun

from compress.errors import InputError, MissingExtraError, WorkError
from deploy import manifest, triton
from deploy.engine_settings import BuilderSettings
from deploy.tensor_spec import TensorSpec
from deploy.triton import repository
from deploy.triton.batching import Batching, batching
from deploy.triton.config import warmup_sample

pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", exc_type=ImportError)

CURVE = {1: 100.0, 4: 300.0, 8: 396.0, 16: 400.0, 32: 500.0}


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")


def read_config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


class TestOnnx:
    def test_every_field(self, run: MadeRun) -> None:
        entry = run.add_onnx("pruned.fp32.onnx")
        run.time(entry, CURVE)
        written = triton.write_repository(run.root, name="cats", max_batch=16, instances=2)

        model = run.root / "triton" / "cats"
        assert written.model == model
        assert written.root == run.root / "triton"
        assert written.files == ("1/model.onnx", "config.pbtxt", "labels.txt", "warmup/images.raw")
        assert (model / "1" / "model.onnx").read_bytes() == (run.artifacts / "pruned.fp32.onnx").read_bytes()
        assert (model / "labels.txt").read_text() == "tabby cat\ndog\nsea lion\n"
        assert len((model / "warmup" / "images.raw").read_bytes()) == 4 * 1 * 2 * 2

        config = read_config(model)
        assert config.name == "cats"
        assert (config.platform, config.backend) == ("onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 16
        (given,) = config.input
        assert (given.name, given.data_type, list(given.dims)) == ("images", pb.TYPE_FP32, [1, 2, 2])
        (result,) = config.output
        assert (result.name, result.data_type, list(result.dims)) == ("logits", pb.TYPE_FP32, [3])
        assert result.label_filename == "labels.txt"
        # 396/s at 8 is 99 % of the highest up to 16; 300/s at 4 is not near; 32 is above the largest batch.
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
        assert config.dynamic_batching.max_queue_delay_microseconds == round(0.1 * 8 / 396 * 1e6)
        (group,) = config.instance_group
        assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_CPU, 2)
        assert config.parameters["intra_op_thread_count"].string_value == "3"
        assert [(sample.name, sample.batch_size) for sample in config.model_warmup] == [
            ("batch_1", 1),
            ("batch_8", 8),
            ("batch_16", 16),
        ]
        for sample in config.model_warmup:
            assert sample.inputs["images"].input_data_file == "images.raw"
            assert sample.inputs["images"].data_type == pb.TYPE_FP32
            assert list(sample.inputs["images"].dims) == [1, 2, 2]
        assert not config.optimization.cuda.graphs
        assert not config.HasField("version_policy")  # Triton's default: the latest version alone

    def test_the_record(self, run: MadeRun, tmp_path: Path) -> None:
        run.time(run.add_onnx("pruned.fp32.onnx"), CURVE)
        written = triton.write_repository(run.root, tmp_path / "models", name="cats", max_batch=16)
        assert written.artefact == run.artifacts / "pruned.fp32.onnx"
        assert "fastest" in written.reason
        assert written.instance_kind == "KIND_CPU"
        assert written.preferred_sizes == (8, 16)
        assert written.rebuild_command is None
        assert written.as_dict()["model"] == str(tmp_path / "models" / "cats")
        assert written.as_dict()["platform"] == "onnxruntime_onnx"
        assert "300.0 at 4" in written.batching_reason

    @pytest.mark.parametrize(
        ("file", "precision", "target", "timed_on", "kind"),
        [
            ("pruned.fp32.onnx", "fp32", "any", "cuda", "KIND_GPU"),
            ("pruned.fp32.onnx", "fp32", "any", None, "KIND_AUTO"),
            ("pruned.int8.cpu.onnx", "int8", "cpu", None, "KIND_CPU"),
            ("pruned.int8.gpu.onnx", "int8", "gpu", None, "KIND_GPU"),
        ],
    )
    def test_where_the_instances_run(
        self, run: MadeRun, file: str, precision: str, target: str, timed_on: str | None, kind: str
    ) -> None:
        entry = run.add_onnx(file, precision=precision, target=target)
        if timed_on:
            run.time(entry, {1: 10.0, 4: 20.0}, device=timed_on)
        config = read_config(triton.write_repository(run.root, name="m", max_batch=4).model)
        assert config.instance_group[0].kind == getattr(pb.ModelInstanceGroup, kind)
        assert "intra_op_thread_count" not in config.parameters

    def test_half_precision_inputs_and_unknown_classes(self, run: MadeRun) -> None:
        run.add_onnx("pruned.fp16.onnx", precision="fp16", dtype="float16", classes=())
        written = triton.write_repository(run.root, name="m", max_batch=4)
        config = read_config(written.model)
        assert config.input[0].data_type == config.output[0].data_type == pb.TYPE_FP16
        assert config.output[0].label_filename == ""
        assert "labels.txt" not in written.files
        assert len((written.model / "warmup" / "images.raw").read_bytes()) == 2 * 1 * 2 * 2
        assert config.HasField("dynamic_batching")
        assert list(config.dynamic_batching.preferred_batch_size) == []
        assert [sample.batch_size for sample in config.model_warmup] == [1, 4]

    def test_external_weights_keep_the_name_that_the_file_knows(self, run: MadeRun) -> None:
        entry = run.add_onnx("pruned.fp32.onnx")
        (run.artifacts / "pruned.fp32.onnx.data").write_bytes(b"large")
        manifest.add(
            run.artifacts,
            entry.file,
            kind="onnx",
            precision="fp32",
            inputs=entry.inputs,
            outputs=entry.outputs,
            checkpoint_digest=entry.checkpoint_sha256,
        )
        written = triton.write_repository(run.root, name="m", max_batch=4)
        assert (written.model / "1" / "pruned.fp32.onnx.data").read_bytes() == b"large"

    def test_warmup_numbers_are_those_of_normalised_images(self) -> None:
        spec = TensorSpec("images", "float32", ("batch", 3, 32, 32))
        numbers = np.frombuffer(warmup_sample(spec), np.float32)
        assert numbers.shape == (3 * 32 * 32,)
        assert abs(numbers.mean()) < 0.1
        assert abs(numbers.std() - 1) < 0.1

    def test_bfloat16(self) -> None:
        assert len(warmup_sample(TensorSpec("x", "bfloat16", ("batch", 5)))) == 10


class TestPlan:
    def test_every_field(self, run: MadeRun) -> None:
        half = run.add_onnx("pruned.fp16.onnx", precision="fp16")
        plan = run.add_plan(half, batch=(1, 8, 16))
        run.time(plan, CURVE, device="cuda:0")
        written = triton.write_repository(run.root, name="cats", max_batch=16)
        assert written.files == (
            "1/model.plan",
            "config.pbtxt",
            "labels.txt",
            "rebuild/pruned.fp16.onnx",
            "rebuild/rebuild.sh",
            "warmup/images.raw",
        )
        assert (written.model / "1" / "model.plan").read_bytes() == (run.artifacts / plan.file).read_bytes()
        assert (written.model / "labels.txt").read_text().startswith("tabby cat\n")
        config = read_config(written.model)
        assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
        assert config.max_batch_size == 16
        assert (config.input[0].name, config.input[0].data_type) == ("images", pb.TYPE_FP32)
        assert list(config.input[0].dims) == [1, 2, 2]
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
        assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
        assert config.instance_group[0].count == 1
        assert config.optimization.cuda.graphs
        assert len(config.parameters) == 0

    def test_the_script_builds_what_was_built(self, run: MadeRun) -> None:
        settings = {
            "tf32": False,
            "optimization_level": 4,
            "workspace_bytes": 2**30,
            "version_compatible": True,
            "hardware_compatible": "ampere-plus",
            "refittable": False,
            "timing_cache": None,
        }
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"), settings=settings)
        written = triton.write_repository(run.root, name="m", max_batch=16)
        assert written.rebuild_command == f"sh {written.model}/rebuild/rebuild.sh YY.MM"
        called = self.docker(written.model, "25.08")
        assert called[:4] == ["run", "--rm", "--gpus", "all"]
        assert called[called.index("-v") + 1] == f"{written.model.resolve()}:/model"
        image = called.index("nvcr.io/nvidia/tensorrt:25.08-py3")
        assert called[image + 1 :] == [
            "trtexec",
            "--onnx=/model/rebuild/pruned.fp16.onnx",
            "--saveEngine=/model/rebuild/model.plan",
            "--skipInference",
            "--stronglyTyped",
            "--minShapes=images:1x1x2x2",
            "--optShapes=images:8x1x2x2",
            "--maxShapes=images:32x1x2x2",
            "--builderOptimizationLevel=4",
            "--noTF32",
            f"--memPoolSize=workspace:{2**30}B",
            "--versionCompatible",
            "--hardwareCompatibilityLevel=ampere+",
        ]
        assert (written.model / "1" / "model.plan").read_bytes() == b"built"

    def test_the_script_names_what_built_the_engine(self, run: MadeRun) -> None:
        settings = BuilderSettings(tf32=True).model_dump(mode="json")
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"), settings=settings)
        script = triton.write_repository(run.root, name="m", max_batch=16).model / "rebuild" / "rebuild.sh"
        assert f"TensorRT 10.16.1.11, {GPU}, compute capability 9.0" in script.read_text()
        command = "espalier engine pruned.fp16.onnx --batch 1:8:32 --opt-level 3 --tf32 && mv pruned.fp16.plan ../1/"
        assert command in script.read_text()
        assert os.access(script, os.X_OK)
        done = subprocess.run(["sh", script], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "give the tag of the Triton container" in done.stderr

    @pytest.mark.parametrize(
        ("batch", "max_batch", "message"),
        [
            ((1, 8, 16), 17, r"takes batches of 1 to 16, and the server .* --max-batch to at most 16, .* 1:8:17"),
            ((2, 8, 16), 16, r"takes batches of 2 to 16, but a server also gets single images: .* --batch 1:8:16"),
        ],
    )
    def test_batches_outside_the_profile(self, run: MadeRun, batch: Any, max_batch: int, message: str) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"), batch=batch)
        with pytest.raises(InputError, match=message):
            triton.write_repository(run.root, name="m", max_batch=max_batch)
        assert not (run.root / "triton").exists()

    @pytest.mark.parametrize("settings", [{"tf32": "x; rm -rf /"}, {"unknown": 1}])
    def test_settings_that_no_builder_has(self, run: MadeRun, settings: dict[str, Any]) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"), settings=settings)
        with pytest.raises(InputError, match=r"does not say how pruned\.fp16\.plan was built"):
            triton.write_repository(run.root, name="m", max_batch=8)
        assert list((run.root / "triton").iterdir()) == []

    def test_the_source_must_be_there(self, run: MadeRun) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"))
        (run.artifacts / "pruned.fp16.onnx").unlink()
        with pytest.raises(InputError, match="does not lie unchanged"):
            triton.write_repository(run.root, name="m", max_batch=1)

    @staticmethod
    def docker(model: Path, tag: str) -> list[str]:
        """Arguments that the script gives to a docker which only writes the engine."""
        folder = model / "bin"
        folder.mkdir()
        log = folder / "arguments"
        docker = folder / "docker"
        docker.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{log}"\nprintf built > "{model}/rebuild/model.plan"\n')
        docker.chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        subprocess.run([model / "rebuild" / "rebuild.sh", tag], env=environment, check=True)
        return log.read_text().splitlines()


class TestBatching:
    def measured(self, run: MadeRun, curve: dict[int, float]) -> Any:
        run.time(run.add_onnx("pruned.fp32.onnx"), curve)
        return run.timed[0].measurements

    @pytest.mark.parametrize(
        ("curve", "max_batch", "preferred"),
        [
            ({1: 100.0, 8: 800.0}, 16, (8,)),
            ({1: 100.0, 8: 800.0, 16: 700.0}, 16, (8,)),  # slower than a smaller one
            ({1: 100.0, 2: 960.0, 4: 950.0, 8: 1000.0}, 16, (2, 8)),  # 4 is near the highest, but slower than 2
            ({2: 100.0, 4: 110.0}, 4, (4,)),
        ],
    )
    def test_preferred_sizes(
        self, run: MadeRun, curve: dict[int, float], max_batch: int, preferred: tuple[int, ...]
    ) -> None:
        found = batching(self.measured(run, curve), max_batch)
        assert found.dynamic
        assert found.preferred_sizes == preferred
        assert found.max_queue_delay_us == round(1e5 * preferred[0] / curve[preferred[0]])
        assert found.warmup_sizes(max_batch) == (1, *preferred)

    def test_single_images_are_as_good_so_nobody_waits(self, run: MadeRun) -> None:
        found = batching(self.measured(run, {1: 96.0, 8: 100.0}), 8)
        assert (found.dynamic, found.preferred_sizes, found.max_queue_delay_us) == (True, (8,), 0)

    def test_single_images_are_fastest(self, run: MadeRun) -> None:
        run.time(run.add_onnx("pruned.fp32.onnx"), {1: 100.0, 8: 90.0})
        config = read_config(triton.write_repository(run.root, name="m", max_batch=16).model)
        assert not config.HasField("dynamic_batching")
        assert config.max_batch_size == 16
        assert [sample.batch_size for sample in config.model_warmup] == [1]

    @pytest.mark.parametrize("curve", [{}, {1: 100.0}, {1: 100.0, 32: 300.0}])
    def test_nothing_is_known_of_these_sizes(self, run: MadeRun, curve: dict[int, float]) -> None:
        found = batching(self.measured(run, curve), 16)
        assert (found.dynamic, found.preferred_sizes, found.max_queue_delay_us) == (True, (), 0)
        assert "no batch size between 2 and 16 was timed" in found.reason
        assert found.warmup_sizes(16) == (1, 16)

    def test_no_batches_at_all(self) -> None:
        assert batching((), 1) == Batching(False, (), 0, "requests are not joined: the largest batch allowed is 1")


class TestFolder:
    def test_ours_is_replaced_as_a_whole(self, run: MadeRun) -> None:
        run.add_onnx("pruned.fp32.onnx")
        first = triton.write_repository(run.root, name="m", max_batch=4)
        (first.model / "1" / "stale").write_text("")
        triton.write_repository(run.root, name="m", max_batch=8)
        assert not (first.model / "1" / "stale").exists()
        assert read_config(first.model).max_batch_size == 8
        assert [path.name for path in first.root.iterdir()] == ["m"]

    @pytest.mark.parametrize("config", [None, 'name: "m"\n'])
    def test_anothers_is_left_alone(self, run: MadeRun, config: str | None) -> None:
        run.add_onnx("pruned.fp32.onnx")
        model = run.root / "triton" / "m"
        model.mkdir(parents=True)
        if config is not None:
            (model / "config.pbtxt").write_text(config)
        with pytest.raises(InputError, match="exists and was not written by espalier triton"):
            triton.write_repository(run.root, name="m", max_batch=4)
        assert [path.name for path in model.iterdir()] == ([] if config is None else ["config.pbtxt"])

    def test_a_full_disk_leaves_the_old_one(self, run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
        run.add_onnx("pruned.fp32.onnx")
        first = triton.write_repository(run.root, name="m", max_batch=4)

        def fail(source: Path, target: Path) -> None:
            target.write_bytes(source.read_bytes()[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(repository.shutil, "copyfile", fail)
        with pytest.raises(WorkError, match=r"Writing .*m failed: No space left on device; free some space"):
            triton.write_repository(run.root, name="m", max_batch=8)
        assert read_config(first.model).max_batch_size == 4
        assert [path.name for path in first.root.iterdir()] == ["m"]

    def test_where_nothing_can_be_written(self, run: MadeRun) -> None:
        run.add_onnx("pruned.fp32.onnx")
        (run.root / "triton").write_text("a file")
        with pytest.raises(InputError, match="Cannot create the directory"):
            triton.write_repository(run.root, name="m", max_batch=4)


class TestBadInput:
    @pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "ü", "x\n", "a" * 200])
    def test_names(self, run: MadeRun, name: str) -> None:
        run.add_onnx("pruned.fp32.onnx")
        with pytest.raises(InputError, match="use letters, digits"):
            triton.write_repository(run.root, name=name, max_batch=4)
        assert not (run.root / "triton").exists()

    @pytest.mark.parametrize(("max_batch", "instances"), [(0, 1), (-1, 1), (4, 0)])
    def test_numbers(self, run: MadeRun, max_batch: int, instances: int) -> None:
        with pytest.raises(InputError, match="give at least 1"):
            triton.write_repository(run.root, name="m", max_batch=max_batch, instances=instances)

    def test_a_changed_artefact(self, run: MadeRun) -> None:
        run.add_onnx("pruned.fp32.onnx")
        path = run.artifacts / "pruned.fp32.onnx"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not the file that the manifest records"):
            triton.write_repository(run.root, name="m", max_batch=4)
        assert not (run.root / "triton").exists()

    def test_the_extra_is_missing(self, run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
        run.add_onnx("pruned.fp32.onnx")
        monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
        monkeypatch.delitem(sys.modules, "tritonclient.grpc.model_config_pb2", raising=False)
        with pytest.raises(MissingExtraError, match=r"pip install 'espalier\[triton\]'"):
            triton.write_repository(run.root, name="m", max_batch=4)
        assert not (run.root / "triton").exists()

    @pytest.mark.parametrize("shape", [(4, 1, 2, 2), ("batch", 1, "height", 2)])
    def test_shapes_that_cannot_be_batched(self, run: MadeRun, shape: tuple[int | str, ...]) -> None:
        entry = run.add_onnx("pruned.fp32.onnx")
        manifest.add(
            run.artifacts,
            entry.file,
            kind="onnx",
            precision="fp32",
            inputs=(TensorSpec("images", "float32", shape),),
            outputs=entry.outputs,
            checkpoint_digest=entry.checkpoint_sha256,
        )
        with pytest.raises(InputError, match=r"has (a|no) fixed .* size"):
            triton.write_repository(run.root, name="m", max_batch=4)
