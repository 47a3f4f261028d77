"""Fixtures for tests of the TensorRT path, which `tests/conftest.py` brings to all tests.

`tensorrt` runs a test under both majors. Where a test needs another GPU or version at some point, `install` puts
another fake in place.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakes.cuda import fake_cuda
from tests.fakes.tensorrt import build_fake, machine

LISTINGS = {
    ".".join(path.stem.split(".")[:2]): path for path in sorted((Path(__file__).parent / "listings").glob("*.json"))
}


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> ModuleType:
    """Make this fake the `tensorrt` that is imported, and its GPU the CUDA device of the TensorRT runtime."""
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("deploy.runtimes.cuda.CudaDevice", fake_cuda(machine(module)))
    return module


@pytest.fixture(params=list(LISTINGS))
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fake of each major in turn, on an NVIDIA H200."""
    return install(monkeypatch, build_fake(LISTINGS[request.param]))
