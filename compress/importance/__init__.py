"""Importance criteria: one file per family, one registry."""

from compress.importance.base import Importance, build, criteria, register
from compress.importance.taylor import Taylor

__all__ = ["Importance", "Taylor", "build", "criteria", "register"]
