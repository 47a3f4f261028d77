"""What `Pruner.step` costs beside a training step: python -m benchmarks.pruner_overhead [--model … --batch … --steps …]

Times forward, backward and optimizer step of a torchvision model on random images, and within the same iteration the
call of `Pruner.step`. The ratio is taken in every iteration; its median is reported. The last call of every interval is
a pruning event and is reported apart.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from benchmarks.harness.environment import environment
from compress import models
from compress.budget import Budget
from compress.pruner import Pruner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--steps", type=int, default=6, help="minibatches; every third is an event")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = models.build(options.model).train()
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(0, 10, (options.batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = time.perf_counter()
    pruner = Pruner(model, images[:1], budget=Budget(macs=0.5), events=max(1, options.steps // 3), interval=3)
    tracing_s = time.perf_counter() - start

    ratios: list[float] = []
    scoring_ms: list[float] = []
    event_ms: list[float] = []
    step_ms: list[float] = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        before = time.perf_counter()
        event = pruner.step(optimizer)
        after = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        training, pruning = (end - begin) - (after - before), after - before
        step_ms.append(1000 * training)
        if event is None:
            scoring_ms.append(1000 * pruning)
            ratios.append(pruning / training)
        else:
            event_ms.append(1000 * pruning)
    json.dump(
        {
            **vars(options),
            "tracing_s": tracing_s,
            "training_step_ms": {"median": statistics.median(step_ms), "samples": step_ms},
            "scoring_ms": {"median": statistics.median(scoring_ms), "samples": scoring_ms},
            "event_ms": {"median": statistics.median(event_ms), "samples": event_ms},
            "scoring_fraction_of_a_step": {"median": statistics.median(ratios), "samples": ratios},
            "environment": environment(),
        },
        sys.stdout,
        indent=2,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
