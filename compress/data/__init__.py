"""Data sets and their loaders."""

from compress.data.opened import Data, Options
from compress.data.sources import SOURCES, load

__all__ = ["SOURCES", "Data", "Options", "load"]
