"""What can go wrong while measuring, told apart by whose move it is."""


class HarnessInputError(ValueError):
    """What was asked cannot be measured or read: no variants, an unknown baseline, a damaged results file."""


class HarnessError(RuntimeError):
    """The request was fine and the measurement failed: a variant raised, or the clock saw no time pass."""
