"""Our clock beside those of others: python -m benchmarks.peers.timers --out FILE.json

One network, opened once in PyTorch and once in ONNX Runtime, is timed again and again, in an order drawn anew for each
repeat, by

    harness          benchmarks.harness.measure, five rounds
    torch.Timer      torch.utils.benchmark.Timer.blocked_autorange
    timm             the loop of the benchmark script of timm
    ort.profiler     ONNX Runtime's own record of how long each run took (ONNX Runtime alone)

Every clock times the same opened network, so ONNX Runtime keeps its record while the other three time it as well; its
record leaves out the call from Python. Each clock has its own way to warm up. It is held against itself, too: readings
of the same thing by the same clock, one repeat and the next, differ by what neither the clock nor the network can help.

Weights and images are random: latency does not depend on them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch.utils.benchmark import Timer

from benchmarks.harness.conditions import Conditions, Watch, summary
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.measure import Variant, measure
from benchmarks.harness.rounds import Plan
from benchmarks.peers.readings import Reading, figures, statements
from compress import models
from deploy.export import export_onnx

ROUNDS = 5
"""Of the harness in one reading."""

WARMUP_S = 0.1
"""Of the harness before each round."""

TIMM_WARMUPS, TIMM_STEPS = 10, 40
"""--num-warm-iter and --num-bench-iter of timm's script, as it has them where the user gives none."""

TIMM_SOURCE = (
    "huggingface/pytorch-image-models, benchmark.py, InferenceBenchmarkRunner.run, commit "
    "fee045eb299ed46b14a947404d3b85af18aad1e8; the script is in no package, so its loop is written here again"
)


class Network(Protocol):
    """A network that is opened: `step` answers one query."""

    name: str

    def step(self) -> None: ...


class Eager:
    """PyTorch, operator by operator."""

    name = "pytorch"

    def __init__(self, model: torch.nn.Module, images: torch.Tensor) -> None:
        self._model = model.eval()
        self._images = images

    def step(self) -> None:
        with torch.inference_mode():
            self._model(self._images)


class OnnxRuntime:
    """ONNX Runtime on the CPU, with its profiler running."""

    name = "onnxruntime"

    def __init__(self, file: Path, images: torch.Tensor, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(file.with_name(f"profile_{threads}"))
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input(self._session.get_inputs()[0].name, images.numpy())
        self._binding.bind_output(self._session.get_outputs()[0].name)
        self.runs = 0

    def step(self) -> None:
        self.runs += 1
        self._session.run_with_iobinding(self._binding)

    def durations_ms(self) -> npt.NDArray[np.float64]:
        """Of every run so far, in order; the profiler ends with it.

        Raises:
            HarnessError: the record is not complete; it holds a million events.
        """
        file = Path(self._session.end_profiling())
        events = json.loads(file.read_text(encoding="utf-8"))
        durations = [event["dur"] / 1000 for event in events if event["name"] == "model_run"]
        if len(durations) != self.runs:
            raise HarnessError(
                f"ONNX Runtime recorded {len(durations)} of {self.runs} runs, since its record is full: lower "
                "--seconds or --repeats."
            )
        return np.array(durations)


def by_harness(network: Network, seconds: float) -> Reading:
    plan = Plan(
        rounds=ROUNDS,
        seconds=seconds / ROUNDS,
        queries=1,
        warmup_s=WARMUP_S,
        time_budget_s=60 + 10 * seconds,
        half_width=float("inf"),  # no more rounds than these
        processes=1,
    )
    measured = measure([Variant(network.name, network.step)], baseline=network.name, plan=plan).variants[network.name]
    return Reading(measured.median_ms.value, measured.mean_ms.value, measured.median_ms.samples)


def by_torch(network: Network, seconds: float) -> Reading:
    threads = torch.get_num_threads()  # it would take one
    timer = Timer("step()", globals={"step": network.step}, num_threads=threads)
    taken = timer.blocked_autorange(min_run_time=seconds)
    return Reading(taken.median * 1e3, taken.mean * 1e3, len(taken.raw_times) * taken.number_per_run)


def by_timm(network: Network, seconds: float) -> Reading:  # noqa: ARG001 - it counts steps, not seconds
    for _ in range(TIMM_WARMUPS):
        network.step()
    taken_ms = []
    for _ in range(TIMM_STEPS):
        begin = time.perf_counter()
        network.step()
        taken_ms.append((time.perf_counter() - begin) * 1e3)
    return Reading.of(taken_ms)


CLOCKS: dict[str, Callable[[Network, float], Reading]] = {
    "harness": by_harness,
    "torch.Timer": by_torch,
    "timm": by_timm,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one reading, but for timm's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error("--repeats must be at least 2: with one there is nothing to compare a clock to itself by.")

    torch.manual_seed(options.seed)
    model, images = models.build(options.model), torch.randn(1, 3, options.size, options.size)
    seen: list[Conditions] = []
    found = {}
    before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            found[str(threads)] = compare(
                model,
                images,
                threads=threads,
                repeats=options.repeats,
                seconds=options.seconds,
                seed=options.seed,
                seen=seen,
            )
    finally:
        torch.set_num_threads(before)
    document = {
        **{name: value for name, value in vars(options).items() if name != "out"},
        "command": "python -m benchmarks.peers.timers",
        "batch": len(images),
        "timm": TIMM_SOURCE,
        "by_threads": found,
        "conditions": summary(seen).model_dump(),
        "environment": environment(Path(__file__).parent),
    }
    options.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(statements(found)) + "\n")


def compare(
    model: torch.nn.Module,
    images: torch.Tensor,
    *,
    threads: int,
    repeats: int,
    seconds: float,
    seed: int = 0,
    seen: list[Conditions] | None = None,
) -> dict[str, dict[str, Any]]:  # runtime -> clock -> figures
    """Every clock's readings of the network in every runtime, and what they say; JSON values.

    Args:
        images: One query, (N, C, H, W).
        threads: For ONNX Runtime; the caller has set PyTorch's.
        seen: Takes the conditions of every reading.
    """
    rng, watch = np.random.default_rng(seed), Watch()
    with TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "network.onnx", image_shape=images.shape[1:])
        profiled = OnnxRuntime(file, images, threads)
        networks: list[Network] = [Eager(model, images), profiled]
        readings: dict[tuple[str, str], list[Reading]] = {}
        recorded: list[slice] = []
        tasks = [(network, clock) for network in networks for clock in CLOCKS] + [(profiled, "ort.profiler")]
        for repeat in range(1, repeats + 1):
            for index in rng.permutation(len(tasks)):
                network, clock = tasks[index]
                watch.start()
                cpu = time.process_time()
                if clock in CLOCKS:
                    reading = CLOCKS[clock](network, seconds)
                    readings.setdefault((network.name, clock), []).append(reading)
                else:
                    recorded.append(run_for(profiled, seconds))
                conditions = watch.stop(own_cpu_s=time.process_time() - cpu)
                if seen is not None:
                    seen.append(conditions)
            sys.stderr.write(f"{threads} threads: repeat {repeat} of {repeats}\n")
        durations_ms = profiled.durations_ms()
        readings[profiled.name, "ort.profiler"] = [Reading.of(durations_ms[runs]) for runs in recorded]
    return {
        network.name: {
            clock: figures(clock, taken, readings[network.name, "harness"], seed)
            for (name, clock), taken in readings.items()
            if name == network.name
        }
        for network in networks
    }


def run_for(network: OnnxRuntime, seconds: float) -> slice:
    """Warm it, run it for so long, and tell which runs these were."""
    for _ in range(TIMM_WARMUPS):
        network.step()
    first, end = network.runs, time.perf_counter() + seconds
    while network.runs == first or time.perf_counter() < end:
        network.step()
    return slice(first, network.runs)


if __name__ == "__main__":
    main()
