import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from compress.errors import InputError
from compress.training.placement import best_layout, opened_accelerator, placed, set_layout


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.convolution(images).view(len(images), -1)


def test_precisions_may_change_from_call_to_call():
    before = dict(AcceleratorState._shared_state)
    for precision in ("bf16", "no", "bf16"):
        with opened_accelerator(precision) as accelerator:
            assert accelerator.mixed_precision == precision
    assert dict(AcceleratorState._shared_state) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the refusal on a machine without a GPU")
def test_fp16_needs_a_gpu():
    with pytest.raises(InputError, match="fp16"), opened_accelerator("fp16"):
        pass


def test_gradients_are_not_divided_by_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = nn.Parameter(torch.tensor(3.0))
    with opened_accelerator() as accelerator:
        accelerator.backward(weight * 2)
    assert weight.grad == 2


def test_a_model_that_uses_view_computes_contiguously():
    images = torch.randn(4, 3, 8, 8)
    model = Views()
    assert best_layout(model, images) == torch.contiguous_format
    assert model.convolution.weight.is_contiguous()
    assert best_layout(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images) == torch.channels_last


def test_strides_of_ambiguous_filters_come_back():
    model = nn.Conv2d(6, 4, 1)
    weight, strides, values = model.weight, model.weight.stride(), model.weight.detach().clone()
    with placed(model, torch.device("cpu")):
        set_layout(model, torch.channels_last)
        assert model.weight.stride() != strides
    assert model.weight is weight
    assert weight.stride() == strides
    assert torch.equal(weight, values)
