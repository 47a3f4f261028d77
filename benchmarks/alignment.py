"""What half the MACs buys, with arbitrary widths and with multiples of 8: python -m benchmarks.alignment [--model …]

Prunes a torchvision model to a MACs budget in one event, once for each `round_to`, exports dense and pruned networks
and measures them in interleaved rounds on ONNX Runtime, CPU. Weights and images are random: accuracy is not the point,
and latency does not depend on it.
"""

import argparse
import json
import sys
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import cross_entropy

from benchmarks.harness.counters import macs
from benchmarks.harness.environment import environment
from benchmarks.harness.measure import Variant, measure
from compress import models
from compress.budget import Budget
from compress.pruner import Pruner
from deploy.export import export_onnx
from deploy.runtimes import Runtime, open_runtime
from deploy.subjects import subject_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the multiply-adds kept")
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    options = parser.parse_args()

    images = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as directory:
        networks = {"dense": build(options.model)}
        for round_to in options.round_to:
            networks[f"round_to={round_to}"] = pruned(options.model, images, options.macs, round_to)
        counts = {name: macs(network, images[:1]) for name, network in networks.items()}
        runtimes = {
            name: open_runtime(export_onnx(network, Path(directory) / f"{name}.onnx", image_shape=images.shape[1:]))
            for name, network in networks.items()
        }
        measured = measure([variant(name, runtime, images) for name, runtime in runtimes.items()], baseline="dense")
    result = {
        **vars(options),
        "variants": {
            name: {
                "macs_ratio": counts[name] / counts["dense"],
                "median_ms": vars(cell.median_ms),
                "speedup": vars(cell.speedup) if cell.speedup else None,
            }
            for name, cell in measured.variants.items()
        },
        "environment": environment(),
    }
    json.dump(result, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def build(factory: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(factory).eval()


def pruned(factory: str, images: torch.Tensor, kept: float, round_to: int) -> torch.nn.Module:
    """The model after one pruning event on one minibatch of random images and labels."""
    model = build(factory).train()
    pruner = Pruner(model, images[:1], budget=Budget(macs=kept), events=1, interval=1, round_to=round_to)
    cross_entropy(model(images), torch.arange(len(images))).backward()
    pruner.step()
    return model.eval()


def variant(name: str, runtime: Runtime, images: torch.Tensor) -> Variant:
    subject = subject_of(runtime, [{runtime.inputs[0].name: images.numpy()}])
    lane = subject.lane()
    following = cycle(range(lane.size)).__next__
    return Variant(name, lambda: lane.query(following()), batch_size=len(images), close=subject.close)


if __name__ == "__main__":
    main()
