"""What the oracle costs against one whole forward pass for each channel: python -m benchmarks.oracle_speed [--model …]

Both ways measure the change of loss of every channel on the same minibatch. They take turns, and the figure is the
median of the paired ratios. The weights are random: the cost does not depend on them.
"""

import argparse
import json
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness.environment import environment
from benchmarks.harness.ratios import paired_speedup
from benchmarks.harness.statistics import median
from compress import data, models
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch
from compress.importance.ablation import Ablation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="espalier:resnet20")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = next(iter(data.load(options.data, batch_size=options.batch, augment=False).train))
    arguments = {"in_channels": images.shape[1]} if options.model.startswith("espalier:") else {}
    model = models.build(options.model, **arguments).eval()
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
        measured = in_parts(ablation, graph, minibatch)
        fast.append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = by_whole_passes(model, graph, minibatch)
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


def in_parts(ablation: Ablation, graph: ChannelGraph, minibatch: Minibatch) -> Tensor:
    """Loss without each channel, (channels,), as the oracle measures it."""
    state = ablation.on(minibatch)
    with torch.no_grad():
        return torch.cat(
            [state.losses({name: 1 - torch.eye(width, dtype=torch.float64)}) for name, width in graph.widths.items()]
        )


@torch.inference_mode()
def by_whole_passes(model: nn.Module, graph: ChannelGraph, minibatch: Minibatch) -> Tensor:
    """The same in the plainest way: the channel's gates at 0, one forward pass, and the gates back."""
    parameters = dict(model.named_parameters())
    losses = []
    for group in graph.groups.values():
        for channel in range(group.width):
            before = []
            for part in group.gates:
                at = part.positions[part.channels == channel]
                tensor = parameters[part.tensor].movedim(part.dim, 0)
                before.append((tensor, at, tensor[at].clone()))
                tensor[at] = 0
            losses.append(minibatch.loss(model(*minibatch.inputs)).double())
            for tensor, at, values in before:
                tensor[at] = values
    return torch.stack(losses)


if __name__ == "__main__":
    main()
