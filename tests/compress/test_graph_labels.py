"""Label tensors: what an axis without channels costs, and that moving data moves labels alike."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.graph.labels import reshaped, spread, varying


@given(data=st.data())
def test_reshaping_moves_labels_as_it_moves_data(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def shape() -> list[int]:
        """Neighbouring factors, multiplied."""
        sizes = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    before, after = shape(), shape()
    sizes = [size if data.draw(st.booleans()) else 1 for size in before]
    labels = torch.arange(prod(sizes)).view(sizes).expand(before)
    assert torch.equal(reshaped(labels, after), labels.reshape(after))


def test_an_axis_that_stays_costs_nothing_in_a_reshape() -> None:
    inputs = torch.arange(4).view(1, 4, 1, 1).expand(1000, 4, 3, 3)  # of a weight, (outputs, inputs, height, width)
    labels = spread(reshaped(inputs, (1, 1000, 36)), (1, 1000, 36))
    assert varying(labels) == [2]
    assert labels.untyped_storage().nbytes() == 36 * 8


def test_what_turns_out_to_be_equal_along_an_axis_is_kept_once() -> None:
    labels = spread(torch.arange(4).repeat(1000, 1), (1000, 4))
    assert (varying(labels), labels.untyped_storage().nbytes()) == ([1], 4 * 8)
