"""What docs/measuring.md says is true: its options exist, its numbers are those of the code, its code runs."""

import re
from pathlib import Path
from typing import Any

from benchmarks.harness import ratios, rounds, statistics, throughput
from benchmarks.harness.rounds import Plan
from deploy import bench_settings, pool
from deploy.bench_settings import SCENARIOS

PAGE = Path(__file__).parents[2] / "docs" / "measuring.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_command_and_option_exists(invoke: Any) -> None:
    commands = re.findall(r"^(?:      - run: )?espalier (\w+)(.*)$", TEXT, flags=re.MULTILINE)
    commands += re.findall(r"`espalier (\w+)([^`]*)`", TEXT)
    assert {name for name, _ in commands} >= {"bench", "compare", "run"}
    for name, rest in commands:
        help_text = invoke(name, "--help").stdout
        for option in re.findall(r"--[\w-]+", rest.partition("#")[0]):
            assert option in help_text, (name, option)


def test_the_numbers_are_those_of_the_code() -> None:
    plan = Plan()
    needed = statistics.SAMPLES_NEEDED
    for stated in (
        f"({plan.time_budget_s:.0f} s for\n  each batch size)",
        f"divided into {rounds.ROUNDS_AIMED_AT} rounds",
        f"but {plan.rounds} if it can",
        f"{plan.queries} queries",
        f"--processes {plan.processes}",
        f"at most {100 * plan.half_width:g} %",
        f"p90 from {needed[90.0]} queries on, p95 from {needed[95.0]}, p99 from {needed[99.0]}, p99.9 from\n"
        f"  {needed[99.9]:,}",
        f"within {100 * ratios.EQUIVALENT:.0f} % of 1",
        f"where {pool.MOST_BYTES // 1024**2} MiB and {pool.MOST_BATCHES:,} queries suffice",
        f"queries of {bench_settings.MULTI_SAMPLES} samples",
        f"reach {100 * throughput.KNEE_SHARE:.0f} % of the highest throughput",
    ):
        assert stated in TEXT, stated
    for name in SCENARIOS:
        assert f"**{name}**" in TEXT


def test_the_python_lines_run(monkeypatch: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    short = code.replace('baseline="old",', 'baseline="old", plan=Plan(rounds=2, seconds=0.01, time_budget_s=0.2),')
    assert short != code
    exec(short, {"old_function": lambda: sum(range(2000)), "new_function": lambda: sum(range(1000)), "Plan": Plan})


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
