"""A realistic results document, made by measuring fake networks on a fake clock."""

from datetime import UTC, datetime

import numpy as np
import pytest

from benchmarks.harness.measure import Variant, measure
from benchmarks.harness.results import (
    Accuracy,
    Artefact,
    BatchMeasurement,
    BudgetResult,
    LayerWidths,
    Pruning,
    PruningEvent,
    Results,
    Runtime,
    VariantResult,
)


class FakeMachine:
    """A clock that only fake steps advance; each takes `step_ns` times lognormal noise, times a drift per query."""

    def __init__(self, seed: int = 0) -> None:
        self.now_ns = 0
        self.rng = np.random.default_rng(seed)

    def clock(self) -> int:
        return self.now_ns

    def variant(self, name: str, step_ns: float, *, noise: float = 0.03, batch_size: int = 1) -> Variant:
        def step() -> None:
            self.now_ns += max(1, int(step_ns * np.exp(noise * self.rng.normal())))

        return Variant(name, step, batch_size)


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture(scope="session")
def results() -> Results:
    """ResNet-20 on the digits, dense and pruned, at batch 1 and 32."""
    machine = FakeMachine(7)
    times_ns = {1: (612_000, 391_000), 32: (14_900_000, 7_650_000)}
    measurements: dict[str, list[BatchMeasurement]] = {"dense": [], "pruned": []}
    for batch, (dense_ns, pruned_ns) in times_ns.items():
        measurement = measure(
            [
                machine.variant("dense", dense_ns, batch_size=batch),
                machine.variant("pruned", pruned_ns, batch_size=batch),
            ],
            baseline="dense",
            min_seconds_per_round=0.05,
            clock=machine.clock,
        )
        for name, measured in measurement.variants.items():
            measurements[name].append(BatchMeasurement.of(measured, measurement))

    def variant(name: str, parameters: int, macs: int, top1: float) -> VariantResult:
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
        created=datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC),
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
            variant("dense", 272_474, 40_813_184, 99.2),
            variant("pruned", 131_890, 20_284_416, 98.9),
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
        training={"baseline": [{"epoch": 1, "loss": 0.41, "top1_percent": 93.1}]},
        provenance={"command": "espalier run"},
    )
