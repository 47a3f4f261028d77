"""What int8 adds to pruning on a CPU: python -m benchmarks.precision_speed [--model …]

Prunes a torchvision model to a MACs budget in widths of multiples of 8, writes it and the dense one in fp32 and in
int8, made for the CPU (unsigned asymmetric activations) and for the GPU (signed symmetric ones), and measures all of
them in interleaved rounds on ONNX Runtime, CPU. Weights, images and calibration images are random: latency does not
depend on them, and accuracy is measured elsewhere, on trained networks.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.alignment import build, pruned, variant
from benchmarks.harness.counters import macs
from benchmarks.harness.environment import environment
from benchmarks.harness.measure import measure
from benchmarks.harness.ratios import paired_speedup
from benchmarks.harness.rounds import Plan
from deploy.export import export_onnx
from deploy.precision import Target
from deploy.precision.calibration import calibrate
from deploy.precision.quantisation import quantise
from deploy.runtimes import open_runtime

RATIOS = (
    ("dense fp32", "pruned fp32"),
    ("dense fp32", "dense int8 cpu"),
    ("dense fp32", "pruned int8 cpu"),
    ("pruned fp32", "pruned int8 cpu"),
    ("dense fp32", "dense int8 gpu"),
    ("dense fp32", "pruned int8 gpu"),
)
"""Baseline, variant."""

TARGETS: tuple[Target, ...] = ("cpu", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the multiply-adds kept")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    images = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    networks = {"dense": build(options.model), "pruned": pruned(options.model, images, options.macs, round_to=8)}
    with TemporaryDirectory() as directory:
        files: dict[str, Path] = {}
        for name, network in networks.items():
            source = export_onnx(network, Path(directory) / f"{name}.fp32.onnx", image_shape=images.shape[1:])
            files[f"{name} fp32"] = source
            for target in TARGETS:
                ranges = calibrate(source, images.numpy(), method="minmax", target=target)
                file = Path(directory) / f"{name}.int8.{target}.onnx"
                quantise(source, file, precision="int8", target=target, ranges=ranges)
                files[f"{name} int8 {target}"] = file
        # These files do not say what they were made for, so those for the GPU can be timed where they do not belong.
        runtimes = {name: open_runtime(file) for name, file in files.items()}
        measured = measure(
            [variant(name, runtime, images) for name, runtime in runtimes.items()],
            baseline="dense fp32",
            plan=Plan(rounds=options.rounds, seconds=1.0, queries=5, time_budget_s=600),
        )
        sizes = {name: file.stat().st_size for name, file in files.items()}
    cells = measured.variants
    result = {
        **vars(options),
        "macs_ratio": macs(networks["pruned"], images[:1]) / macs(networks["dense"], images[:1]),
        "median_ms": {name: vars(cell.median_ms) for name, cell in cells.items()},
        "size_bytes": sizes,
        "speedups": {
            f"{name} over {baseline}": vars(
                paired_speedup(cells[baseline].rounds_ns, cells[name].rounds_ns, baseline=baseline, seed=0)
            )
            for baseline, name in RATIOS
        },
        "environment": environment(),
    }
    json.dump(result, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
