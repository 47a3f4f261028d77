"""Run directories made by hand: checkpoints, artefacts in a manifest, and results of a chosen throughput curve."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import torch

from benchmarks.harness.cells import BatchMeasurement, Latency
from benchmarks.harness.results import Artefact, Results, Runtime, VariantResult
from benchmarks.harness.statistics import Estimate
from compress import checkpoint, models
from deploy import manifest
from deploy.metadata import Metadata, Quantisation, write_metadata
from deploy.onnx_file import onnx_specs

CLASSES = ("tabby cat", "dog", "sea\nlion")
GPU = "NVIDIA H200"

# (N, 1, 2, 2) -> (N, 3)
NETWORK = """
<ir_version: 10, opset_import: ["" : 20]>
network ({type}[batch, 1, 2, 2] images) => ({type}[batch, 3] logits)
<float[4, 3] weight = {{1, 0, 0, 0, 1, 0, 0, 0, 1, -1, -1, -1}}, int64[2] shape = {{-1, 4}}>
{{
    wide = Cast<to = 1>(images)
    pixels = Reshape(wide, shape)
    narrow = MatMul(pixels, weight)
    logits = Cast<to = {code}>(narrow)
}}
"""


def onnx_bytes(dtype: str = "float", **about: Any) -> bytes:
    """The little network above with metadata; `about` replaces fields of it."""
    code = {"float": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[dtype]
    model = onnx.parser.parse_model(NETWORK.format(type=dtype, code=code))
    fields: dict[str, Any] = {
        "version": "0",
        "torch_version": "0",
        "image_shape": (1, 2, 2),
        "classes": CLASSES,
        "mean": (0.5,),
        "std": (0.25,),
        "checkpoint_sha256": "",
        "other": {},
    }
    write_metadata(model, Metadata.model_validate(fields | about))
    return model.SerializeToString()


class MadeRun:
    """A run directory that is filled piece by piece."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.artifacts.mkdir(parents=True)
        self.digests = {variant: self._checkpoint(variant) for variant in ("baseline", "pruned")}
        self.timed: list[VariantResult] = []

    def add_onnx(
        self,
        file: str,
        *,
        precision: Any = "fp32",
        target: Any = "any",
        of: str = "pruned",
        dtype: str = "float",
        **about: Any,
    ) -> manifest.Entry:
        path = self.artifacts / file
        about = {"checkpoint_sha256": self.digests[of], "other": {"file": file}} | about
        path.write_bytes(onnx_bytes(dtype, precision=precision, target=target, **about))
        inputs, outputs = onnx_specs(onnx.load(path), path)
        quantised = precision in ("int8", "fp8")
        return manifest.add(
            self.artifacts,
            file,
            kind="onnx",
            precision=precision,
            target=target,
            inputs=inputs,
            outputs=outputs,
            checkpoint_digest=self.digests[of],
            quantisation=Quantisation(calibration="minmax", data="digits", samples=8) if quantised else None,
        )

    def add_plan(
        self, source: manifest.Entry, batch: Sequence[int] = (1, 8, 32), settings: Mapping[str, Any] | None = None
    ) -> manifest.Entry:
        """An engine that nothing can execute, entered as built from an ONNX file."""
        file = source.file.replace(".onnx", ".plan")
        (self.artifacts / file).write_bytes(b"engine of " + source.sha256.encode())
        minimum, optimum, maximum = ((size, 1, 2, 2) for size in batch)
        return manifest.add(
            self.artifacts,
            file,
            kind="plan",
            precision=source.precision,
            target=source.target,
            inputs=source.inputs,
            outputs=source.outputs,
            checkpoint_digest=source.checkpoint_sha256,
            source_digest=source.sha256,
            engine=manifest.EngineRecord(
                tensorrt_version="10.16.1.11",
                gpu=GPU,
                compute_capability=(9, 0),
                profiles={"images": manifest.Profile(minimum=minimum, optimum=optimum, maximum=maximum)},
                settings=dict(settings or {}),
            ),
        )

    def time(
        self, entry: manifest.Entry, curve: Mapping[int, float], *, device: str = "cpu", provider: str | None = None
    ) -> None:
        """Record that the file gave `curve[batch size]` images per second; results.json is written anew."""
        engine = entry.kind == "plan"
        proof = {} if engine else {"provider": provider or f"{device.upper()}ExecutionProvider", "threads": 3}
        self.timed.append(
            VariantResult(
                name=f"{entry.file} on {provider or device}",
                kind="pruned",
                artefact=Artefact(
                    path=f"artifacts/{entry.file}",
                    sha256=entry.sha256,
                    size_bytes=entry.size_bytes,
                    precision=entry.precision,
                ),
                runtime=Runtime(name="tensorrt" if engine else "onnxruntime", version="1", device=device, proof=proof),
                parameters=1,
                macs=1,
                accuracy=None,
                parity=None,
                measurements=[_measured(size, throughput) for size, throughput in curve.items()],
            )
        )
        results = Results(
            created=datetime.now(UTC),
            recipe={},
            seeds={},
            environment={},
            variants=self.timed,
            pruning=None,
            training={},
            provenance={},
        )
        (self.root / "results.json").write_text(results.to_json())

    def _checkpoint(self, variant: str) -> str:
        torch.manual_seed(len(variant))
        arguments = {"num_classes": 3, "in_channels": 1, "image_size": 16}
        model = models.build("espalier:lenet3", **arguments)
        directory = self.root / variant
        checkpoint.save(model, directory, factory="espalier:lenet3", kwargs=arguments, image_shape=(1, 16, 16))
        return checkpoint.Architecture.read(directory).sha256


def _measured(batch_size: int, throughput: float) -> BatchMeasurement:
    def exactly(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value, samples=10)

    latency = exactly(1000 * batch_size / throughput)
    return BatchMeasurement(
        batch_size=batch_size,
        scenario="SingleStream" if batch_size == 1 else "Offline",
        latency=Latency(median_ms=latency, mean_ms=latency, p90_ms=None, p95_ms=None, p99_ms=None, p999_ms=None),
        throughput_per_s=exactly(throughput),
        speedup=None,
        again=None,
        stopped_by="precision",
        reruns=0,
        stages=None,
        phases=None,
        conditions=None,
        processes=[],
        samples_ms=[],
        throttled_samples_ms=[],
    )
