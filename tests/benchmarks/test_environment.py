"""What is recorded of the machine."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pynvml
import pytest
import torch

from benchmarks.harness import machine_gpu
from benchmarks.harness.cgroups import Throttling, controller, memory_limit_bytes, quota_cores, throttling
from benchmarks.harness.environment import environment
from benchmarks.harness.machine_cpu import cpu_facts, frequencies_mhz, virtual_machine
from benchmarks.harness.machine_files import listed
from tests.fakes.nvml import ANSWERS, FakeGpu, FakeNvml

XEON = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6430
microcode\t: 0x2b000590
cpu MHz\t\t: 2100.000
flags\t\t: fpu sse2 aperfmperf avx2 avx512f avx512_vnni amx_int8

processor\t: 1
cpu MHz\t\t: 3400.500
flags\t\t: fpu

processor\t: 4
cpu MHz\t\t: 800.000
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two sockets and two nodes, of which this process may use cores 0 and 1."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 0})
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": XEON,
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Some Linux 3"\n',
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "sys/class/dmi/id/sys_vendor": "Dell Inc.\n",
        "sys/class/dmi/id/product_name": "PowerEdge R760\n",
        "sys/devices/system/node/node0/cpulist": "0-1,4\n",
        "sys/devices/system/node/node1/cpulist": "2-3,5\n",
        "run/.containerenv": "",
        f"{cpu}/smt/active": "1\n",
        f"{cpu}/intel_pstate/no_turbo": "0\n",
        f"{cpu}/cpu0/cpufreq/scaling_governor": "powersave\n",
        f"{cpu}/cpu0/cpufreq/scaling_driver": "intel_pstate\n",
        f"{cpu}/cpu0/cpufreq/scaling_min_freq": "800000\n",
        f"{cpu}/cpu0/cpufreq/scaling_max_freq": "3400000\n",
        f"{cpu}/cpu0/cpufreq/energy_performance_preference": "balance_performance\n",
        f"{cpu}/cpu0/topology/physical_package_id": "0\n",
        f"{cpu}/cpu1/topology/physical_package_id": "0\n",
        f"{cpu}/cpu2/topology/physical_package_id": "1\n",
        **{
            f"{cpu}/cpu0/cache/index{index}/{name}": value
            for index, (level, kind, size, shared) in enumerate(
                [("1", "Data", "48K", "0-1"), ("3", "Unified", "60M", "0-1,4")]
            )
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared))
        },
    }
    for path, content in files.items():
        write(tmp_path / path, content)
    return tmp_path


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_facts_are_those_of_this_process(tmp_path):
    facts = environment(tmp_path)
    assert facts["libraries"]["torch"] == torch.__version__.partition("+")[0] or facts["libraries"]["torch"]
    assert facts["libraries"]["torch-pruning"]
    assert facts["threads"]["torch_intra_op"] == torch.get_num_threads()
    assert facts["cpu"]["logical_cores"] == psutil.cpu_count()
    assert facts["cpu"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert facts["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_importing_it_does_not_import_torch():
    program = "import sys, benchmarks.harness.environment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_processor_of_a_made_up_machine(root):
    facts = cpu_facts(root)
    expected = {
        "model": "Intel(R) Xeon(R) Gold 6430",
        "microcode": "0x2b000590",
        "flags": ["amx_int8", "avx2", "avx512_vnni", "avx512f"],
        "sockets": 2,
        "smt": True,
        "affinity": [0, 1],
        "numa_nodes": [0, 1],
        "affinity_numa_nodes": [0],
        "caches": [
            {"level": 1, "type": "data", "size_bytes": 48 << 10, "shared_by_cores": 2},
            {"level": 3, "type": "unified", "size_bytes": 60 << 20, "shared_by_cores": 3},
        ],
        "governor": "powersave",
        "frequency_driver": "intel_pstate",
        "frequency_min_mhz": 800.0,
        "frequency_max_mhz": 3400.0,
        "energy_preference": "balance_performance",
        "boost": True,
    }
    assert expected.items() <= facts.items()


def test_system_of_a_made_up_machine(root, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    expected = {
        "os": "Some Linux 3",
        "clock_source": "tsc",
        "virtual_machine": False,
        "vendor": "Dell Inc.",
        "product": "PowerEdge R760",
        "container": "podman",
    }
    assert expected.items() <= environment(root, root=root)["system"].items()


def test_what_cannot_be_read_is_none(tmp_path):
    facts = environment(tmp_path, root=tmp_path)
    unreadable = ("microcode", "flags", "sockets", "smt", "numa_nodes", "affinity_numa_nodes", "caches", "quota")
    unreadable += ("quota_cores", "governor", "frequency_driver", "frequency_min_mhz", "frequency_max_mhz", "boost")
    assert {name: facts["cpu"][name] for name in unreadable} == dict.fromkeys(unreadable)
    assert facts["memory"]["limit_bytes"] is None
    assert facts["system"]["virtual_machine"] is None
    assert facts["system"]["clock_source"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t: fpu hypervisor avx2\n", True),
        ("flags\t: fpu avx2\n", False),
        ("Features\t: fp asimd i8mm\n", None),  # Arm does not tell
    ],
)
def test_virtual_machine(tmp_path, cpuinfo, expected):
    write(tmp_path / "proc/cpuinfo", cpuinfo)
    assert virtual_machine(tmp_path) is expected


def test_flags_of_an_arm_processor(tmp_path):
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\n")
    assert cpu_facts(tmp_path)["flags"] == ["asimd", "asimddp", "bf16", "i8mm"]


def test_boost_of_other_drivers(tmp_path):
    write(tmp_path / "sys/devices/system/cpu/cpufreq/boost", "0\n")
    assert cpu_facts(tmp_path)["boost"] is False


def test_frequencies_are_measured_or_left_out(root):
    assert frequencies_mhz([0, 1], root) == [2100.0, 3400.5]  # of the allowed cores only
    write(root / "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "2900000\n")
    assert frequencies_mhz([0, 1], root) == [2900.0]
    (root / "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq").unlink()
    write(root / "proc/cpuinfo", XEON.replace("aperfmperf", "hypervisor"))
    assert frequencies_mhz([0, 1], root) == []  # a constant, not a measurement


def test_limits_of_control_groups_version_2(tmp_path):
    tree = tmp_path / "sys/fs/cgroup"
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    write(tree / "cgroup.controllers", "cpu memory\n")
    write(tree / "outer/cpu.max", "150000 100000\n")
    write(tree / "outer/cpu.stat", "usage_usec 5\nnr_periods 9\nnr_throttled 3\nthrottled_usec 250000\n")
    write(tree / "outer/memory.max", "max\n")
    write(tree / "outer/inner/cpu.max", "max 100000\n")
    write(tree / "outer/inner/cpu.stat", "nr_throttled 1\nthrottled_usec 500000\n")
    write(tree / "outer/inner/memory.max", "4096\n")
    assert quota_cores(tmp_path) == 1.5
    assert memory_limit_bytes(tmp_path) == 4096
    assert throttling(controller("cpu", tmp_path)) == Throttling(periods=4, seconds=0.75)


def test_limits_of_control_groups_version_1(tmp_path):
    tree = tmp_path / "sys/fs/cgroup"
    write(tmp_path / "proc/self/cgroup", "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n")
    write(tree / "cpu,cpuacct/cpu.cfs_quota_us", "50000\n")  # a container sees its own group as the outermost
    write(tree / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(tree / "cpu,cpuacct/cpu.stat", "nr_periods 9\nnr_throttled 2\nthrottled_time 1500000000\n")
    write(tree / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tree / "memory/docker/ab/memory.limit_in_bytes", "8192\n")
    assert quota_cores(tmp_path) == 0.5
    assert memory_limit_bytes(tmp_path) == 8192
    assert throttling(controller("cpu", tmp_path)) == Throttling(periods=2, seconds=1.5)


def test_no_control_groups(tmp_path):
    assert quota_cores(tmp_path) is None
    assert throttling(controller("cpu", tmp_path)) is None
    write(tmp_path / "proc/self/cgroup", "4:cpu:/\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert quota_cores(tmp_path) is None


def test_lists_of_the_kernel():
    assert listed("0-2,8") == [0, 1, 2, 8]
    assert listed(None) == listed("") == []


def test_gpus_of_a_made_up_machine(monkeypatch, tmp_path):
    gpu = FakeGpu(processes={os.getpid(): 1 << 30, 1: None})
    nvml = FakeNvml(gpu, FakeGpu(uuid="GPU-1"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = environment(tmp_path)["gpus"]
    assert first == {
        "index": 0,
        "name": "NVIDIA A10",
        "uuid": "GPU-0",
        "driver": "570.86.10",
        "compute_capability": "8.6",
        "memory_bytes": 24 << 30,
        "power_limit_w": 140.0,
        "power_limit_default_w": 150.0,
        "power_limit_max_w": 155.0,
        "sm_clock_mhz": 1410,
        "sm_clock_max_mhz": 1710,
        "sm_clock_application_mhz": 1320,
        "sm_clock_application_default_mhz": 1695,
        "memory_clock_mhz": 6251,
        "memory_clock_max_mhz": 6251,
        "temperature_c": 61,
        "persistence_mode": True,
        "pcie_generation": 1,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "ecc": True,
        "mig": False,
        "compute_processes": 2,
        "other_compute_processes": 1,
    }
    assert (second["index"], second["uuid"], second["compute_processes"]) == (1, "GPU-1", 0)
    assert nvml.opened == 0


def test_a_gpu_that_answers_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu(unsupported=set(ANSWERS))))
    (facts,) = machine_gpu.gpu_facts()
    assert {name for name, value in facts.items() if value is not None} == {"index", "driver"}


def test_the_older_question_for_the_temperature(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu(unsupported={"nvmlDeviceGetTemperatureV"})))
    assert machine_gpu.gpu_facts()[0]["temperature_c"] == 61
    package = FakeNvml(FakeGpu())
    del package.nvmlDeviceGetTemperatureV  # a package older than the function
    monkeypatch.setitem(sys.modules, "pynvml", package)
    assert machine_gpu.gpu_facts()[0]["temperature_c"] == 61


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    assert machine_gpu.gpu_facts() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert machine_gpu.gpu_facts() == []


def test_every_name_of_nvml_is_one_of_the_installed_package():
    source = Path(machine_gpu.__file__).read_text() + Path(machine_gpu.__file__).with_name("conditions.py").read_text()
    names = set(re.findall(r'"((?:nvml[A-Z]|NVML_)\w+)"', source)) | {"nvmlInit", "NVMLError"}
    assert len(names) > 25
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []
    fake = FakeNvml()
    assert [name for name in sorted(names) if not hasattr(fake, name)] == []
    for name, answer in ANSWERS.items():
        inspect.signature(getattr(pynvml, name)).bind(*inspect.signature(answer).parameters)
    for constant in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(fake, constant) == getattr(pynvml, constant)


def test_reasons_have_the_numbers_of_the_installed_package():
    for bit, name in machine_gpu.REASONS.items():
        assert getattr(pynvml, "nvmlClocksEventReason" + name.title().replace("_", "")) == bit
    assert machine_gpu.reason_names(0) == []
    assert machine_gpu.reason_names(0x44) == ["sw_power_cap", "hw_thermal_slowdown"]
    assert machine_gpu.reason_names(1 << 12) == ["0x1000"]  # newer than this program


def test_whose_processes_they_are():
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert machine_gpu.strangers([]) == 0
        assert machine_gpu.strangers([os.getpid(), child.pid]) == 0
        assert machine_gpu.strangers([os.getpid(), 1]) == 1
        assert machine_gpu.strangers([os.getpid(), 2**22 + 1]) is None  # no process can have this number
    finally:
        child.kill()
        child.wait()


def test_no_repository_is_none(tmp_path):
    assert environment(tmp_path)["git"] is None


def test_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    assert environment(tmp_path)["git"] == {"commit": None, "dirty": True}
    git("add", ".")
    git("commit", "-m", "first")
    assert environment(tmp_path)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert environment(tmp_path)["git"]["dirty"] is True
