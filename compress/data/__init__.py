"""Data sets and their loaders."""

from compress.data.sources import SOURCES, Data, Options, load

__all__ = ["SOURCES", "Data", "Options", "load"]
