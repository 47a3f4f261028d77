"""What doctor finds, on this machine and on imagined ones."""

import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from deploy import doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, to be changed by the test."""
    versions = dict.fromkeys((*doctor.CORE, "onnxruntime"), "1.0")
    monkeypatch.setattr(doctor, "_version", versions.get)
    return versions


def shown(found: dict) -> str:
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        for part in doctor.tables(found):
            console.print(part)
    return capture.get()


def test_versions_and_devices_of_this_machine() -> None:
    found = doctor.examine()
    assert found["versions"]["torch"] is not None
    assert found["devices"]["cores"] >= 1
    assert "CPUExecutionProvider" in found["onnxruntime"]["providers"]


def test_what_is_missing_comes_with_the_extra_that_brings_it(installed: dict[str, str]) -> None:
    found = doctor.examine()
    assert {item["library"]: item["install"] for item in found["missing"]} == {
        "onnxruntime-gpu": "pip install 'espalier[gpu]'",
        "timm": "pip install 'espalier[timm]'",
        "nvidia-modelopt": "pip install 'espalier[quant]'",
        "tensorrt": "pip install 'espalier[tensorrt]'",
        "tritonclient": "pip install 'espalier[triton]'",
    }
    assert found["problems"] == []
    text = shown(found)
    assert "pip install 'espalier[timm]'" in text
    assert "No problem found." in text


def test_no_onnx_runtime(installed: dict[str, str]) -> None:
    del installed["onnxruntime"]
    (problem,) = doctor.examine()["problems"]
    assert problem.endswith("run pip install 'espalier[cpu]'.")


def test_both_onnx_runtimes(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.0"
    (problem,) = doctor.examine()["problems"]
    assert "overwrite each other" in problem


@pytest.mark.parametrize(
    ("version", "beside", "words"),
    [
        ("10.3.0", None, "TensorRT 10.3.0 is installed, which engines are not built with"),
        ("12.0.1", None, "TensorRT 12.0.1 is installed, which engines are not built with"),
        ("11.4.0.106", "1.31.1", "onnxruntime-gpu links TensorRT 10"),
    ],
)
def test_tensorrt(installed: dict[str, str], version: str, beside: str | None, words: str) -> None:
    installed["tensorrt"] = version
    if beside is not None:
        del installed["onnxruntime"]
        installed["onnxruntime-gpu"] = beside
    (problem,) = doctor.examine()["problems"]
    assert words in problem


@pytest.mark.parametrize("version", ["10.12.0.36", "10.16.1.11", "11.4.0.106"])
def test_a_supported_tensorrt_is_no_problem(installed: dict[str, str], version: str) -> None:
    installed["tensorrt"] = version
    assert doctor.examine()["problems"] == []


def test_not_installed(installed: dict[str, str]) -> None:
    del installed["espalier"]
    (problem,) = doctor.examine()["problems"]
    assert "not installed" in problem


def test_the_extras_exist() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for item in doctor.OPTIONAL:
        brought = project["optional-dependencies"][item.extra]
        assert any(requirement.startswith((f"{item.library}>", f"{item.library}[")) for requirement in brought)
