import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deploy.precision import Precision
from deploy.precision.qdq import quantise_weight, symmetric_scale

WEIGHTS = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-1e3, 1e3, width=32)
)


def test_scale_is_the_largest_value_over_the_largest_number() -> None:
    assert symmetric_scale(3.0, "int8") == np.float32(3) / np.float32(127)
    assert symmetric_scale(3.0, "fp8") == np.float32(3) / np.float32(448)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_was_never_active_has_a_scale_to_divide_by(precision: Precision) -> None:
    assert symmetric_scale(0.0, precision) == 1
    assert symmetric_scale(1e-45, precision) == 1  # its scale would not be a normal number


def test_weight_has_one_scale_for_each_output_channel() -> None:
    weight = np.array([[1.27, -0.5, 0.0], [0.2, -2.54, 1.0]], np.float32)
    quantised, scale = quantise_weight(weight, 0, "int8")
    np.testing.assert_allclose(scale, [0.01, 0.02], rtol=1e-6)
    assert quantised.tolist() == [[127, -50, 0], [10, -127, 50]]
    assert quantised.dtype == np.int8
    _, scale = quantise_weight(weight, 1, "int8")
    np.testing.assert_allclose(scale, np.array([1.27, 2.54, 1.0]) / 127, rtol=1e-6)


def test_fp8_weight_is_e4m3_with_its_largest_at_448() -> None:
    quantised, scale = quantise_weight(np.array([[4.48, 0.01, -0.175]], np.float32), 0, "fp8")
    np.testing.assert_allclose(scale, [0.01], rtol=1e-6)
    assert quantised.dtype == ml_dtypes.float8_e4m3fn
    # 17.5 lies between 16 and 18, the neighbours with 3 bits behind the point.
    np.testing.assert_array_equal(quantised.astype(np.float32), [[448, 1, -18]])


@given(WEIGHTS, st.data())
def test_int8_weight_is_off_by_half_a_step_at_most(weight: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, weight.ndim - 1))
    quantised, scale = quantise_weight(weight, axis, "int8")
    steps = np.expand_dims(scale, tuple(index for index in range(weight.ndim) if index != axis)).astype(np.float64)
    assert (np.abs(quantised * steps - weight) <= 0.5 * steps * (1 + 1e-5)).all()


@given(WEIGHTS)
def test_fp8_weight_is_off_by_a_sixteenth_at_most(weight: np.ndarray) -> None:
    quantised, scale = quantise_weight(weight, 0, "fp8")
    steps = np.expand_dims(scale, tuple(range(1, weight.ndim))).astype(np.float64)
    # Half a unit of 3 bits behind the point, or half of the smallest subnormal number 2^-9.
    bound = np.maximum(np.abs(weight) / 16, steps * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(quantised.astype(np.float64) * steps - weight) <= bound).all()
