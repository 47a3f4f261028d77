"""Training and evaluation mode of whole networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_ASIDE: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode for the block, then every module back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode for a measurement of our own, which `is_aside` tells from the user's training."""
    token = _ASIDE.set(True)
    try:
        with evaluation_mode(model):
            yield
    finally:
        _ASIDE.reset(token)


def is_aside() -> bool:
    """Whether the network now runs for a measurement of our own: what watches the training looks away."""
    return _ASIDE.get()
