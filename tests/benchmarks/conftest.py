"""Two realistic results documents, made by measuring fake networks on a fake clock."""

import numpy as np
import pytest

from benchmarks.harness.results import (
    Accuracy,
    Artefact,
    BudgetResult,
    LayerWidths,
    Pruning,
    PruningEvent,
    Results,
    Runtime,
    VariantResult,
)
from tests.benchmarks import made_results as made
from tests.benchmarks.made_results import FakeMachine


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture(scope="session")
def results() -> Results:
    """A run: ResNet-20 on the digits, dense and pruned, at batch 1 and 32, with everything measured that can be."""
    measurements = made.measured(
        {1: {"dense": 612_000, "pruned": 391_000}, 32: {"dense": 14_900_000, "pruned": 7_650_000}}, baseline="dense"
    )

    def variant(name: str, parameters: int, macs: int, top1: float, width: int) -> VariantResult:
        return VariantResult(
            name=name,
            kind="pruned" if name == "pruned" else "dense",
            artefact=Artefact(
                path=f"artifacts/{name}.fp32.onnx",
                sha256=name.encode().hex().ljust(64, "0"),
                size_bytes=4 * parameters + 21_000,
                precision="fp32",
            ),
            runtime=Runtime(name="ONNX Runtime", version="1.31.1", device="CPU", proof={"CPUExecutionProvider": 47}),
            parameters=parameters,
            macs=macs,
            accuracy=Accuracy.of(top1_percent=top1, top5_percent=100.0, loss=0.041, samples=360),
            parity={"samples": 64, "max_relative_error": 2.1e-6, "top1_agreement_percent": 100.0},
            measurements=measurements[name],
            server=made.server(measurements[name][0].latency.median_ms.value, limit_ms=5.0),
            throughput=made.throughput(measurements[name][0].latency.median_ms.value),
            rooflines=[made.roofline(m.batch_size, m.latency.median_ms.value, width=width) for m in measurements[name]],
        )

    rng = np.random.default_rng(1)
    layers = [LayerWidths(name="conv1", width_before=16, width_after=16)]
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            for conv in (1, 2):
                kept = int(width * rng.choice([0.5, 0.5, 0.75, 1.0])) // 8 * 8
                layers.append(
                    LayerWidths(name=f"layer{stage}.{block}.conv{conv}", width_before=width, width_after=max(8, kept))
                )
    fractions = np.linspace(1, 0.497, 11)[1:]
    return Results(
        created=made.WHEN,
        recipe={"model": {"factory": "espalier:resnet20"}, "data": {"source": "digits"}},
        seeds={"training": 0, "measuring": 0},
        environment={
            "cpu": {"model": "AMD EPYC 7763", "physical_cores": 2, "affinity": [0, 1], "governor": None},
            "threads": {"torch_intra_op": 2},
            "gpus": [],
            "libraries": {"torch": "2.15.0", "onnxruntime": "1.31.1"},
            "git": {"commit": "4f1d0e6bb3a55d0d54d3a2c4a9a3b1a9a3a7f3f1", "dirty": False},
        },
        variants=[
            variant("dense", 272_474, 40_813_184, 99.2, width=16),
            variant("pruned", 131_890, 20_284_416, 98.9, width=11),
        ],
        pruning=Pruning(
            budget=BudgetResult(
                quantity="macs", requested_fraction=0.5, achieved_fraction=0.497, dense_cost=40_813_184
            ),
            layers=layers,
            events=[
                PruningEvent(
                    index=index,
                    minibatch=10 * index,
                    loss=0.05 + 0.03 * index**0.5,
                    cost=40_813_184 * fraction,
                    widths={"layer1": 16 - index // 2},
                )
                for index, fraction in enumerate(fractions, start=1)
            ],
        ),
        explanations=[made.explanation("dense", "pruned", baseline_ms=0.6, variant_ms=0.4)],
        training={"baseline": [{"epoch": 1, "loss": 0.41, "top1_percent": 93.1}]},
        provenance={"command": "espalier run"},
    )


FILES = {
    "runs/flowers/artifacts/dense.fp16.onnx@onnxruntime:provider=cuda": ("ONNX Runtime", "1.31.1", "fp16"),
    "runs/flowers/artifacts/pruned.fp16.plan": ("TensorRT", "10.16.1.11", "fp16"),
    "runs/flowers/artifacts/pruned.int8.gpu.plan": ("TensorRT", "10.16.1.11", "int8"),
    "vendor/resnet50-from-somewhere-else-with-a-long-name.onnx": ("ONNX Runtime", "1.31.1", "not stated"),
    "my_package.models:compiled_resnet": ("python", "not known", "not stated"),
}


@pytest.fixture(scope="session")
def bench_results() -> Results:
    """A bench: five files on three runtimes of one GPU. One is no faster, one died before its first query."""
    dense, pruned, quantised, other, died = FILES
    times_ns = {
        1: {dense: 2_120_000, pruned: 1_010_000, quantised: 790_000, other: 2_125_000},
        8: {dense: 4_800_000, pruned: 2_950_000, quantised: 1_420_000, other: 5_610_000},
    }
    measurements = made.measured(times_ns, baseline=dense, gpu=True)
    device = "NVIDIA H200"

    def variant(name: str, number: int) -> VariantResult:
        runtime, version, precision = FILES[name]
        cells = measurements.get(name, [])
        middle = cells[0].latency.median_ms.value if cells else None
        return VariantResult(
            name=name,
            artefact=Artefact(
                path=name.partition("@")[0],
                sha256=f"{number}" * 64,
                size_bytes=51_000_000 // (number + 1),
                precision=precision,
            ),
            runtime=Runtime(name=runtime, version=version, device=device, proof={"pid": 100 + number}),
            parameters=None,
            macs=None,
            accuracy=None,
            parity=None,
            measurements=cells,
            server=made.server(middle, limit_ms=20.0, lanes=2) if middle and name != other else None,
            failure=f"Variant {name!r} failed while it was measured: the process ended with signal 11 "
            "(segmentation fault) at its first query; last line: libdevice: out of luck"
            if name == died
            else None,
        )

    return Results(
        created=made.WHEN,
        recipe={},
        seeds={"measuring": 0},
        environment={"gpus": [{"name": device, "driver": "590.48"}], "python": "3.12.4"},
        variants=[variant(name, number) for number, name in enumerate(FILES)],
        pruning=None,
        training={},
        not_measured={
            "accuracy": "espalier bench times files and does not know the labels; espalier compare finds accuracies.",
            "layers": "layers were not timed; ask with --explain.",
        },
        provenance={"command": "espalier bench", "inputs": "random, standard normal; 64 samples of 602112 bytes"},
    )
