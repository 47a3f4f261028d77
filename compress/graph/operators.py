"""Loads all rules into the operator tables."""

from compress.graph import elementwise, kernels, layers, norms, positions, products, shapes  # noqa: F401
