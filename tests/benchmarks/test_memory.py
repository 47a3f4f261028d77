"""Memory of a process, in the host and on made-up GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import memory
from tests.fakes.nvml import FakeGpu, FakeNvml

SIZE = 64 << 20


def test_what_is_held_counts_and_the_peak_stays():
    before = memory.host_bytes()
    held = np.ones(SIZE, dtype=np.uint8)
    during, peak = memory.host_bytes(), memory.host_peak_bytes()
    assert during - before > 0.9 * SIZE
    del held
    assert memory.host_bytes() < during
    assert memory.host_peak_bytes() > 0.99 * peak > 0.99 * (before + 0.9 * SIZE)  # the kernel counts in batches


def test_the_peak_is_of_this_program_alone():
    """A small program that a large one starts has not been large."""
    held = np.ones(4 * SIZE, dtype=np.uint8)
    program = "from benchmarks.harness.memory import host_peak_bytes; print(host_peak_bytes())"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=root)
    assert 1 << 20 < int(found.stdout) < held.size


def test_where_the_kernel_keeps_no_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.host_peak_bytes() > 1 << 20
    assert memory.host_bytes() == memory.host_peak_bytes()
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert (memory.host_bytes(), memory.host_peak_bytes()) == (1 << 20, 2 << 20)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], None),
        ([{}], None),
        ([{7: 300}, {7: 20, 8: 5}], 320),
        ([{7: 300}, {8: 5}], 300),
        ([{7: 300}, {7: None}], None),
    ],
)
def test_device_memory_of_a_process(monkeypatch, gpus, expected):
    nvml = FakeNvml(*(FakeGpu(uuid=f"GPU-{index}", processes=held) for index, held in enumerate(gpus)))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert memory.device_bytes(7) == expected
    assert nvml.opened == 0


def test_device_memory_of_this_process(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu(processes={os.getpid(): 99})))
    assert memory.device_bytes() == 99
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    assert memory.device_bytes() is None


def test_it_takes_the_standard_library_only():
    program = (
        "import sys, benchmarks.harness.memory; "
        "sys.exit(not {'torch', 'numpy', 'pydantic', 'psutil', 'scipy'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
