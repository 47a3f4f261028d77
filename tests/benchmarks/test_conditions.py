"""What the machine did while something was timed: on this machine, and on made-up ones with known figures."""

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from benchmarks.harness import conditions as module
from benchmarks.harness.conditions import Conditions, GpuConditions, Range, Watch, summary
from benchmarks.harness.errors import HarnessInputError
from tests.fakes.nvml import ANSWERS, FakeGpu, FakeNvml

TICKS = os.sysconf("SC_CLK_TCK")


class MadeUpMachine:
    """Two allowed cores of three, a clock, and the kernel's counters as files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 100.0

    def write(self, path: str, content: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)

    def cores(self, *spent: tuple[float, float, float]) -> None:
        """Seconds of each core: busy, idle, steal."""
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for core, (busy, idle, steal) in enumerate(spent):
            user, nice, system, irq, softirq = (share * busy for share in (0.4, 0.1, 0.25, 0.2, 0.05))
            parts = [user, nice, system, idle / 2, idle / 2, irq, softirq, steal, user / 2, nice / 2]
            lines.append(f"cpu{core} " + " ".join(str(round(part * TICKS)) for part in parts))
        self.write("proc/stat", "\n".join([*lines, "intr 1 2 3", ""]))

    def held_back(self, *, core: int, package: int, periods: int, wait_s: float) -> None:
        thermal = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
        self.write(thermal.format(0, "core"), f"{core}\n")
        self.write(thermal.format(0, "package"), f"{package}\n")
        self.write(thermal.format(1, "package"), f"{package}\n")
        self.write("sys/fs/cgroup/cpu.stat", f"nr_throttled {periods}\nthrottled_usec {round(wait_s * 1e6)}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> MadeUpMachine:
    machine = MadeUpMachine(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: machine.now_s))
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/cgroup.controllers", "cpu\n")
    return machine


@pytest.fixture
def nvml(monkeypatch):
    def use(*gpus: FakeGpu, driver: bool = True) -> FakeNvml:
        fake = FakeNvml(*gpus, driver=driver)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return use


def conditions(**changed) -> Conditions:
    facts = {
        "seconds": 1.0,
        "cpu_busy_percent": 50.0,
        "cpu_others_percent": 2.0,
        "steal_percent": 0.0,
        "load_average_1": 1.0,
        "cpu_mhz": None,
        "cpu_throttle_events": 0,
        "quota_periods_throttled": None,
        "quota_throttled_s": None,
        "gpus": (),
    }
    return Conditions(**facts | changed)


def gpu(index: int = 0, **changed) -> GpuConditions:
    facts = {
        "index": index,
        "uuid": f"GPU-{index}",
        "samples": 10,
        "sm_clock_mhz": Range(minimum=1400, median=1500, maximum=1600),
        "memory_clock_mhz": None,
        "power_w_max": 300.0,
        "temperature_c_max": 60.0,
        "memory_used_bytes_max": 1 << 30,
        "clock_reasons": (),
        "other_compute_processes": 0,
    }
    return GpuConditions(**facts | changed)


def test_on_this_machine():
    with Watch() as watch:
        begin, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - begin < 0.2:
            pass
        seen = watch.stop(own_cpu_s=time.process_time() - cpu)
    assert watch.conditions is seen
    assert 0.2 <= seen.seconds < 5
    assert 0 < seen.cpu_busy_percent <= 101
    assert seen.cpu_others_percent >= 0
    assert seen.load_average_1 >= 0
    assert seen.gpus == ()
    assert Conditions.model_validate_json(seen.model_dump_json()) == seen


def test_no_thread_runs_where_no_gpu_is_watched():
    before = threading.active_count()
    with Watch():
        assert threading.active_count() == before


def test_shares_of_known_work(machine):
    machine.cores((10, 50, 0), (20, 40, 1), (0, 60, 0))
    machine.held_back(core=4, package=7, periods=3, wait_s=1.5)
    watch = Watch(root=machine.root).start()
    machine.now_s += 4
    machine.cores((14, 50, 0), (21, 42, 2), (2, 62, 0))  # core 2 is not ours
    machine.held_back(core=5, package=9, periods=5, wait_s=1.75)
    seen = watch.stop(own_cpu_s=3.0)
    assert seen.seconds == 4
    assert seen.cpu_busy_percent == pytest.approx(100 * 5 / 8)
    assert seen.steal_percent == pytest.approx(100 * 1 / 8)
    assert seen.cpu_others_percent == pytest.approx(100 * (4 + 1 + 2 - 3) / 4)
    assert seen.cpu_throttle_events == 1 + 2 + 2
    assert (seen.quota_periods_throttled, seen.quota_throttled_s) == (2, 0.25)
    assert seen.throttle_reasons == ("cpu: thermal", "cpu: quota")


def test_without_the_cpu_time_of_the_timed_process_the_others_are_unknown(machine):
    machine.cores((1, 1, 0), (1, 1, 0))
    with Watch(root=machine.root) as watch:
        machine.now_s += 1
        machine.cores((2, 1, 0), (1, 2, 0))
    assert watch.conditions.cpu_busy_percent == 50
    assert watch.conditions.cpu_others_percent is None


def test_ticks_are_coarse_so_the_others_never_fall_below_nothing(machine):
    machine.cores((1, 1, 0), (1, 1, 0))
    watch = Watch(root=machine.root).start()
    machine.now_s += 1
    machine.cores((2, 1, 0), (1, 2, 0))
    assert watch.stop(own_cpu_s=1.004).cpu_others_percent == 0


def test_what_cannot_be_read_is_none(machine):
    watch = Watch(root=machine.root).start()
    machine.now_s += 1
    seen = watch.stop(own_cpu_s=0.5)
    unread = seen.model_dump(exclude={"seconds", "load_average_1", "gpus"})
    assert unread == dict.fromkeys(unread)
    assert not seen.throttled


def test_clocks_of_the_allowed_cores(machine):
    for core, khz in enumerate((2_000_000, 3_000_000, 9_000_000)):
        machine.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{khz}\n")
    with Watch(root=machine.root) as watch:
        pass
    assert watch.conditions.cpu_mhz == Range(minimum=2000, median=2500, maximum=3000)


def test_one_slot_after_another(machine):
    machine.cores((0, 0, 0), (0, 0, 0))
    watch = Watch(root=machine.root)
    with pytest.raises(RuntimeError, match="not been started"):
        watch.stop()
    watch.start()
    machine.now_s += 7  # this slot failed and was not stopped
    watch.start()
    machine.now_s += 1
    machine.cores((1, 0, 0), (0, 1, 0))
    assert watch.stop().seconds == 1
    watch.start()
    machine.now_s += 2
    machine.cores((2, 1, 0), (1, 2, 0))
    seen = watch.stop()
    assert (seen.seconds, seen.cpu_busy_percent) == (2, 50)


def test_gpus_are_sampled(nvml):
    busy = FakeGpu(sm_clocks=[1500, 1410, 1200], reasons=0x1 | 0x2 | 0x4, processes={os.getpid(): 1, 1: 2})
    fake = nvml(busy, FakeGpu(uuid="GPU-1"))
    with Watch([0], interval_s=0.01) as watch:
        deadline = time.monotonic() + 5
        while fake.asked.count("nvmlDeviceGetPowerUsage") < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
    (seen,) = watch.conditions.gpus
    assert seen.samples >= 3
    assert seen.sm_clock_mhz == Range(minimum=1200, median=1200 if seen.samples > 4 else 1305, maximum=1500)
    assert seen.memory_clock_mhz == Range(minimum=6251, median=6251, maximum=6251)
    assert (seen.index, seen.uuid) == (0, "GPU-0")
    assert (seen.power_w_max, seen.temperature_c_max, seen.memory_used_bytes_max) == (120.5, 61, 2 << 30)
    assert seen.clock_reasons == ("sw_power_cap",)  # neither idleness nor a clock that someone chose
    assert seen.other_compute_processes == 1
    assert not watch.conditions.throttled
    assert fake.opened == 0
    assert not any(thread.name == "watch" for thread in threading.enumerate())


def test_a_short_slot_still_has_one_sample(nvml):
    nvml(FakeGpu())
    with Watch(True, interval_s=60) as watch:
        pass
    assert [seen.samples for seen in watch.conditions.gpus] == [1]


def test_every_slot_has_its_own_samples(nvml):
    fake = nvml(FakeGpu(reasons=0x8))
    watch = Watch(True, interval_s=60)
    watch.start()
    assert watch.stop().throttle_reasons == ("gpu 0: hw_slowdown",)
    fake.gpus[0].reasons = 0
    watch.start()
    assert watch.stop().throttle_reasons == ()
    watch.close()
    watch.close()
    assert fake.opened == 0


def test_gpus_are_chosen_by_number_or_uuid(nvml):
    nvml(FakeGpu(), FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2"))

    def watched(chosen):
        with Watch(chosen, interval_s=60) as watch:
            pass
        return [seen.index for seen in watch.conditions.gpus]

    assert watched(True) == [0, 1, 2]
    assert watched(False) == watched([]) == []
    assert watched(["GPU-2", 0]) == [2, 0]
    with pytest.raises(HarnessInputError, match="no GPU 3: the driver lists 0, 1, 2, GPU-0, GPU-1, GPU-2"):
        Watch([3])


def test_no_driver_is_none(nvml):
    nvml(driver=False)
    with Watch(True) as watch:
        pass
    assert watch.conditions.gpus is None
    assert not watch.conditions.throttled


def test_a_gpu_that_answers_nothing(nvml):
    nvml(FakeGpu(unsupported=set(ANSWERS)))
    with Watch([0], interval_s=60) as watch:
        pass
    (seen,) = watch.conditions.gpus
    read = {name for name, value in seen.model_dump().items() if value is not None}
    assert read == {"index", "samples"}


@pytest.mark.parametrize(
    ("reason", "throttled"),
    [
        ("hw_slowdown", True),
        ("sw_thermal_slowdown", True),
        ("hw_thermal_slowdown", True),
        ("hw_power_brake_slowdown", True),
        ("sw_power_cap", False),
        ("sync_boost", False),
        ("0x1000", False),
    ],
)
def test_which_reasons_are_worth_another_try(reason, throttled):
    seen = conditions(gpus=(gpu(1, clock_reasons=(reason,)),))
    assert seen.throttled is throttled
    assert seen.throttle_reasons == ((f"gpu 1: {reason}",) if throttled else ())


def test_the_record_is_strict():
    with pytest.raises(ValidationError):
        conditions(seconds=float("nan"))
    with pytest.raises(ValidationError):
        conditions(unknown=1)
    with pytest.raises(ValidationError):
        conditions().seconds = 2


def test_summary_of_slots():
    slots = [
        conditions(cpu_busy_percent=10, cpu_mhz=Range(minimum=1000, median=2000, maximum=3000), gpus=(gpu(),)),
        conditions(cpu_busy_percent=None, cpu_throttle_events=2, gpus=(gpu(clock_reasons=None, power_w_max=350),)),
        conditions(
            cpu_busy_percent=30,
            cpu_mhz=Range(minimum=900, median=3000, maximum=3100),
            quota_periods_throttled=4,
            gpus=(
                gpu(
                    clock_reasons=("hw_slowdown", "sw_power_cap"),
                    sm_clock_mhz=Range(minimum=800, median=900, maximum=1000),
                    other_compute_processes=3,
                ),
            ),
        ),
        conditions(cpu_busy_percent=20, gpus=None),
    ]
    seen = summary(slots)
    assert (seen.slots, seen.throttled_slots, seen.seconds) == (4, 2, 4)
    assert seen.throttle_reasons == {"cpu: quota": 1, "cpu: thermal": 1, "gpu 0: hw_slowdown": 1}
    assert seen.cpu_busy_percent == Range(minimum=10, median=20, maximum=30)
    assert seen.cpu_mhz == Range(minimum=900, median=2500, maximum=3100)
    assert (seen.cpu_throttle_events, seen.quota_periods_throttled, seen.quota_throttled_s) == (2, 4, None)
    (device,) = seen.gpus
    assert device.samples == 30
    assert device.sm_clock_mhz == Range(minimum=800, median=1500, maximum=1600)
    assert device.memory_clock_mhz is None
    assert device.clock_reasons == {"hw_slowdown": 1, "sw_power_cap": 1}
    assert (device.power_w_max, device.other_compute_processes_max) == (350, 3)
    assert type(seen).model_validate_json(seen.model_dump_json()) == seen


def test_summary_of_no_slots():
    seen = summary([])
    assert (seen.slots, seen.gpus, seen.cpu_busy_percent, seen.cpu_throttle_events) == (0, (), None, None)
