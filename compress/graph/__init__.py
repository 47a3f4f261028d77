"""The channel groups of any model, found by running labels through its recorded operators."""

from compress.graph.custom import custom_layer
from compress.graph.groups import ChannelGraph, Frozen, Group, Producer, Slices
from compress.graph.rules import rule
from compress.graph.tracing import trace

__all__ = ["ChannelGraph", "Frozen", "Group", "Producer", "Slices", "custom_layer", "rule", "trace"]
