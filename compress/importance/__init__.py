"""Importance criteria: one file per family, one registry."""

from compress.importance.activations import TaylorFullGradient, TaylorOutput
from compress.importance.base import Importance, Minibatch, build, criteria, criterion, register
from compress.importance.logits import TaylorLogits
from compress.importance.oracle import Oracle
from compress.importance.second_order import (
    HessianDiagonal,
    OptimalBrainDamage,
    TaylorSecondOrder,
    TaylorSecondOrderFull,
)
from compress.importance.taylor import BatchNormTaylor, Taylor, TaylorWeight
from compress.importance.weights import BatchNormScale, Magnitude, Random

__all__ = [
    "BatchNormScale",
    "BatchNormTaylor",
    "HessianDiagonal",
    "Importance",
    "Magnitude",
    "Minibatch",
    "OptimalBrainDamage",
    "Oracle",
    "Random",
    "Taylor",
    "TaylorFullGradient",
    "TaylorLogits",
    "TaylorOutput",
    "TaylorSecondOrder",
    "TaylorSecondOrderFull",
    "TaylorWeight",
    "build",
    "criteria",
    "criterion",
    "register",
]
