"""What the oracle costs against one whole forward pass for each channel: python -m benchmarks.oracle_speed [--model …]

Both ways measure the change of loss of every channel on the same minibatch. They take turns, and the figure is the
median of the paired ratios. Weights and images are random: the cost does not depend on them.
"""

import argparse
import json
import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness import environment
from benchmarks.harness.statistics import median, paired_speedup
from compress import models
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch
from compress.importance.ablation import AblatedMinibatch, Ablation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="espalier:resnet20")
    parser.add_argument("--shape", type=int, nargs=3, default=[1, 32, 32], help="of one image; 1 32 32 as in digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    torch.manual_seed(0)
    arguments = {"in_channels": options.shape[0]} if options.model.startswith("espalier:") else {}
    model = models.build(options.model, **arguments).eval()
    images = torch.randn(options.batch, *options.shape)
    labels = torch.randint(10, (options.batch,))
    minibatch = Minibatch((images,), lambda logits: cross_entropy(logits, labels))
    graph = trace(model, images[:2])
    start = time.perf_counter()
    ablation = Ablation(model, graph, minibatch)
    prepared = time.perf_counter() - start
    fast: list[float] = []
    slow: list[float] = []
    difference = 0.0
    for _ in range(options.rounds):
        start = time.perf_counter()
        measured = every_channel(ablation.on(minibatch), graph, whole=False)
        fast.append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = every_channel(ablation.on(minibatch), graph, whole=True)
        slow.append(time.perf_counter() - start)
        difference = max(difference, float((measured - plain).abs().max()))
    result = {
        **vars(options),
        "channels": sum(graph.widths.values()),
        "seconds_once": prepared,
        "seconds_in_parts": median(fast),
        "seconds_whole_passes": median(slow),
        "speedup": paired_speedup(
            [[seconds] for seconds in slow], [[seconds] for seconds in fast], baseline="whole passes", seed=0
        ).model_dump(),
        "largest_difference_of_losses": difference,
        "environment": environment(),
    }
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


def every_channel(state: AblatedMinibatch, graph: ChannelGraph, *, whole: bool) -> Tensor:
    """Loss without each channel, by whole forward passes or by parts of many at once."""
    losses = state.losses_by_whole_passes if whole else state.losses
    with torch.no_grad():
        found = [losses({name: 1 - torch.eye(width, dtype=torch.float64)}) for name, width in graph.widths.items()]
    return torch.cat(found)


if __name__ == "__main__":
    main()
