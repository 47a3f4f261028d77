"""Skips what this machine cannot run, with the reason; keeps torch's tracing chatter out of failure reports."""

import importlib.util
import logging

import pytest
import torch

from tests.fakes.fixtures import tensorrt  # noqa: F401  a fixture for all


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = torch.cuda.is_available()
    library = gpu and importlib.util.find_spec("tensorrt") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
        if item.get_closest_marker("tensorrt") and not library:
            item.add_marker(pytest.mark.skip(reason="needs TensorRT and a CUDA GPU"))


@pytest.fixture(autouse=True)
def _quiet_tracing() -> None:
    logging.getLogger("torch").setLevel(logging.WARNING)
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)
