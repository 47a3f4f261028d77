"""Counting what a network costs before any clock runs: MACs and parameters.

One MAC is one multiply-add; FLOPs = 2 x MACs. Counted are matrix products, convolutions and attention as PyTorch
executes them (`torch.utils.flop_counter`); biases, normalisation, activations and pooling are not.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.errors import HarnessInputError


def macs(model: nn.Module, example_inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> int:
    """MACs of one image: those of a forward pass of `example_inputs` (N first) divided by N.

    The pass runs in evaluation mode without gradients; every module's own mode is restored afterwards.

    Raises:
        HarnessInputError: `example_inputs` holds no image.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not inputs or inputs[0].ndim == 0 or inputs[0].shape[0] == 0:
        raise HarnessInputError("MACs are counted per image, but example_inputs holds none: give at least one.")
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    # The counter's hooks ask for the gradient function of every argument, which a parameter handed to a module has not.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know what is inside that one operator
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
    return counter.get_total_flops() // (2 * inputs[0].shape[0])


def parameters(model: nn.Module) -> int:
    """Number of parameters; one that several modules share counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
