"""Fixtures of the fakes' own tests."""

from types import ModuleType

import pytest

from tests.fakes.protocol import Session


@pytest.fixture
def session(tensorrt: ModuleType) -> Session:
    """The objects that building and running need, under a fake of each major in turn."""
    return Session(tensorrt)
