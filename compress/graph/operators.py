"""Loads all rules into the operator tables."""

from compress.graph import contractions, elementwise, kernels, layers, norms, positions, products, shapes  # noqa: F401
