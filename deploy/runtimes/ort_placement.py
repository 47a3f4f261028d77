"""Which provider executed which node: read off the profile that ONNX Runtime writes of a run."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from compress.errors import WorkError

MEMORY_COPIES = frozenset({"MemcpyToHost", "MemcpyFromHost"})
"""Nodes that ONNX Runtime puts in where neighbours compute in different memories; they compute nothing."""


@dataclass(frozen=True)
class Placement:
    """Kernels of one run."""

    kernels: dict[str, dict[str, int]]
    """Provider -> type of node -> how many of them it executed; a TensorRT engine is one node."""
    memory_copies: int
    """Copies between host and device inside the network; they count for no provider, but they take time."""

    def by_provider(self) -> dict[str, int]:
        """Provider -> number of kernels."""
        return {provider: sum(nodes.values()) for provider, nodes in self.kernels.items()}

    def elsewhere(self, provider: str) -> str:
        """What others than that provider executed: `2 Resize, 1 TopK on CPUExecutionProvider`; empty if nothing."""
        return "; ".join(
            f"{', '.join(f'{count} {node}' for node, count in nodes.items())} on {other}"
            for other, nodes in self.kernels.items()
            if other != provider
        )

    def require_only(self, provider: str, file: str) -> None:
        """Refuse that another provider executed anything.

        Raises:
            WorkError: one did, or nothing shows that this provider executed anything; names the nodes.
        """
        elsewhere = self.elsewhere(provider)
        if elsewhere:
            raise WorkError(
                f"{file} was to run on {provider}, which lacks some of its nodes: {elsewhere}; choose another "
                "runtime, or allow it with onnxruntime:allow_fallback=true."
            )
        if provider not in self.kernels:
            raise WorkError(
                f"{file} was to run on {provider}, but the profile of a run shows no kernel at all; "
                "choose another runtime."
            )


def read_profile(path: Path) -> Placement:
    """The placement in a profile file of ONNX Runtime."""
    nodes = [
        (event["args"]["provider"], event["args"].get("op_name", "unnamed"))
        for event in json.loads(path.read_text(encoding="utf-8"))
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    ]
    counts = Counter(node for node in nodes if node[1] not in MEMORY_COPIES)
    kernels: dict[str, dict[str, int]] = {}
    for (provider, node), count in counts.items():
        kernels.setdefault(provider, {})[node] = count
    return Placement(kernels, memory_copies=len(nodes) - counts.total())
