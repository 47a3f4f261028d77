"""In what the machines and the software of two documents differ, as far as it decides how fast they are."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import Field, JsonValue

from benchmarks.harness.cells import Record

CPU: Final = {
    "CPU": "model",
    "CPU microcode": "microcode",
    "CPU sockets": "sockets",
    "logical cores": "logical_cores",
    "cores allowed": "affinity",
    "CPU quota in cores": "quota_cores",
    "SMT": "smt",
    "governor": "governor",
    "energy preference": "energy_preference",
    "boost": "boost",
    "highest CPU clock in MHz": "frequency_max_mhz",
}

GPU: Final = {
    "GPU {}": "name",
    "GPU {} driver": "driver",
    "GPU {} power limit in W": "power_limit_w",
    "GPU {} application clock in MHz": "sm_clock_application_mhz",
    "GPU {} ECC": "ecc",
    "GPU {} MIG": "mig",
}
"""Not its UUID: another one of the same model is what the control is there for."""

SYSTEM: Final = {
    "operating system": "os",
    "kernel": "kernel",
    "architecture": "machine",
    "virtual machine": "virtual_machine",
    "container": "container",
    "clock source": "clock_source",
}


class Difference(Record):
    """Something that is not the same in both documents; None where one does not tell."""

    name: str
    old: JsonValue
    new: JsonValue
    hardware: bool = Field(description="Another CPU or GPU: the ratios tell of the machines.")


def differences(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[Difference]:
    """Of two `environment` sections. What neither of them tells counts as the same."""
    before, after = dict(_facts(old)), dict(_facts(new))
    return [
        Difference(name=name, old=before.get(name), new=after.get(name), hardware=_is_hardware(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


def commit(environment: Mapping[str, JsonValue]) -> str | None:
    """The commit that was measured, with a + where files differed from it; None where it is not known."""
    git = _section(environment, "git")
    found = git.get("commit")
    return f"{found}{'+' if git.get('dirty') else ''}" if isinstance(found, str) else None


def _facts(environment: Mapping[str, Any]) -> Iterator[tuple[str, JsonValue]]:
    cpu, system = _section(environment, "cpu"), _section(environment, "system")
    for name, key in CPU.items():
        yield name, cpu.get(key)
    gpus = environment.get("gpus")
    for index, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        for name, key in GPU.items():
            yield name.format(index), gpu.get(key) if isinstance(gpu, dict) else None
    for name, setting in _section(environment, "threads").items():
        yield f"threads: {name}", setting
    for name, key in SYSTEM.items():
        yield name, system.get(key)
    yield "Python", environment.get("python")
    for name, version in _section(environment, "libraries").items():
        yield name, version


def _section(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = environment.get(name)
    return section if isinstance(section, dict) else {}


def _is_hardware(name: str) -> bool:
    return name == "CPU" or name.removeprefix("GPU ").isdigit()
