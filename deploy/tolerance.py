"""How far a file of each precision may lie from its network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from deploy.precision import Precision

TIE: Final = 1e-5
"""Two classes tie when their reference logits differ by at most this share of the sample's largest |logit|:
the order is then a matter of rounding, and either class counts as the top one."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the errors of `BatchParity`; None sets no bound."""

    largest_flip: float
    max_relative_error: float | None = None
    sqnr_db: float | None = None
    """At least this much."""


def _floating_point(significand_bits: int) -> Tolerance:
    """The errors that a thousand roundings in sequence leave.

    Rounding to p bits of significand moves a value by at most u = 2^-p of itself. Errors of n roundings that are
    independent add up like √n (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4), and √1024 = 32; two
    roundings a layer, of weights and of activations, leave room for 500 layers. Errors of two logits together can flip
    classes that are twice as far apart.
    """
    bound = 32 * 2.0**-significand_bits
    return Tolerance(max_relative_error=bound, largest_flip=2 * bound)


def _quantised(one_rounding_db: float) -> Tolerance:
    """The noise that a hundred roundings in sequence leave, 20 dB above that of one, with 3 dB to spare.

    Independent noises add up in power. Outliers that the calibration clips make the largest error meaningless, so none
    is set. Two logits, each off by the noise, can flip classes that are twice as far apart.
    """
    bound = one_rounding_db - 20 - 3
    return Tolerance(sqnr_db=bound, largest_flip=2 * 10 ** (-bound / 20))


TOLERANCES: Final[Mapping[Precision, Tolerance]] = {
    # A thousand times what another order of summation causes.
    "fp32": Tolerance(max_relative_error=1e-3, largest_flip=TIE),
    "fp16": _floating_point(11),
    "bf16": _floating_point(8),
    # 256 steps of Δ over twice the largest value, noise Δ²/12, a largest value ten times the root mean square:
    # 10 log10(12 · 128² / 10²) = 33 dB.
    "int8": _quantised(33),
    # E4M3 has 4 bits of significand: steps of 2^-3 of the power of two below a value, noise 2^-6/12 of its square.
    # For values even over a binade 10 log10(12 · 2^6 · 7/3) = 32.5 dB, for normally distributed ones 31.5 dB.
    "fp8": _quantised(31.5),
}
"""What a sound file of each precision keeps to, and a broken one does not; derived from the number formats.

They say that a file computes its network, not that it is good enough: of a quantised file that is for its own
accuracy to say (`evaluate_runtime`), as no bound on logits tells what a loss of signal costs in classes."""
