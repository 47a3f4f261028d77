"""How often the harness claims what is not, and misses what is: python -m benchmarks.claims [--out FILE]

Repeats one comparison many times: a network against itself, and against itself with every query made slower by a known
share. Each time, the interval of the first ratio should hold 1, and the second should be called slower. Each variant
runs in processes of its own, as `espalier bench` runs them.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.environment import environment
from benchmarks.harness.measure import Measurement, measure
from benchmarks.harness.ratios import half_width
from benchmarks.harness.rounds import Plan
from benchmarks.harness.subject import Candidate
from benchmarks.slowed import open_slowed
from deploy.subjects import open_artefact

SAME, SLOWED = "same", "slowed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--slow-down", type=float, default=0.03, help="share by which every query is made slower")
    parser.add_argument("--seconds", type=float, default=40.0, help="time budget of one comparison")
    parser.add_argument("--out", type=Path, help="file to write; stdout by default")
    options = parser.parse_args(arguments)

    plan = Plan(time_budget_s=options.seconds)
    with TemporaryDirectory() as folder:
        opened = _export(options.model, options.size, Path(folder))
        repeats = []
        for seed in range(options.repeats):
            began = time.perf_counter()
            measurement = measure(candidates(opened, options.slow_down), baseline="network", plan=plan, seed=seed)
            repeats.append(record(measurement) | {"seconds": time.perf_counter() - began})
            sys.stderr.write(f"{len(repeats)}: {_sentence(repeats[-1])}\n")
    result = {
        **{name: value for name, value in vars(options).items() if name != "out"},
        **counts(repeats),
        "repeats": repeats,
        "environment": environment(),
    }
    text = json.dumps(result, indent=1, default=str) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


def candidates(opened: Mapping[str, Any], slow_down: float) -> list[Candidate]:
    """The network three times: as it is, as it is, and slowed."""
    return [
        Candidate("network", open_artefact, opened),
        Candidate(SAME, open_artefact, opened),
        Candidate(SLOWED, open_slowed, {"share": slow_down, "arguments": dict(opened)}),
    ]


def record(measurement: Measurement) -> dict[str, Any]:
    """What one comparison said."""
    found: dict[str, Any] = {"rounds": len(measurement.order), "stopped_by": measurement.stopped_by}
    for name in (SAME, SLOWED):
        speedup = measurement.variants[name].speedup
        assert speedup is not None
        found[name] = speedup.model_dump(mode="json") | {"half_width": half_width(speedup)}
    assert measurement.again is not None
    found["again"] = measurement.again.model_dump(mode="json")
    return found


def counts(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of how many comparisons what was claimed."""
    return {
        "same_interval_holds_1": sum(item[SAME]["low"] <= 1 <= item[SAME]["high"] for item in repeats),
        "same_verdicts": dict(Counter(item[SAME]["verdict"] for item in repeats)),
        "slowed_verdicts": dict(Counter(item[SLOWED]["verdict"] for item in repeats)),
        "longest_s": max(item["seconds"] for item in repeats),
    }


def _sentence(item: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {item[name]['value']:.4f} [{item[name]['low']:.4f}, {item[name]['high']:.4f}] {item[name]['verdict']}"
        for name in (SAME, SLOWED)
    ]
    return f"{', '.join(parts)}; {item['rounds']} rounds in {item['seconds']:.0f} s, ended by {item['stopped_by']}"


def _export(factory: str, size: int, folder: Path) -> dict[str, Any]:
    """Write the network and its inputs; what `open_artefact` takes."""
    import torch

    from benchmarks.alignment import build
    from deploy.export import export_onnx
    from deploy.pool import last_level_cache_bytes, pool_images, write_pool

    model = export_onnx(build(factory), folder / "network.onnx", image_shape=(3, size, size))
    count = pool_images(1, 4 * 3 * size * size, last_level_cache_bytes())
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    write_pool(folder / "pool", [images.numpy()])
    return {
        "artefact": str(model),
        "pool": str(folder / "pool"),
        "batch_size": 1,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
