"""First-order Taylor importance on gates (Molchanov et al., CVPR 2019, arXiv 1906.10771)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.graph import ChannelGraph
from compress.importance.base import Importance, register


@register("taylor")
class Taylor(Importance):
    """Squared gradient of a gate that stands on the channel, `(∂E/∂z_c)²` (equation 8 of the paper, on gates).

    On one minibatch with mean loss E the gate's gradient is `∂E/∂z_c = Σ_p Σ_{s∈θ_{p,c}} s · ∂E/∂s`, where θ_{p,c} are
    the affine pair (γ_c, β_c) of the normalisation that follows producer p or, where none follows, filter c of p and
    its bias (`Group.gates`). Summed over the producers first, then squared; the squares are averaged over minibatches.
    No hooks and no extra pass: parameters and their gradients suffice.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, momentum: float = 0.9) -> None:
        super().__init__(model, graph, momentum=momentum)
        self._parameters = dict(model.named_parameters())
        self._plan: list[tuple[str, int, Tensor, Tensor]] = []
        self._planned_for: torch.device | None = None

    def _measure(self) -> Tensor:
        device = next(iter(self._parameters.values())).device
        if device != self._planned_for:
            self._plan, self._planned_for = self._planned(device), device
        gate = torch.zeros(sum(self.graph.widths.values()), dtype=torch.float64, device=device)
        # One product and one sum for each parameter, then one scatter for all channels of all groups.
        parts = []
        for name, dim, positions, _ in self._plan:
            parameter = self._parameters[name]
            if parameter.grad is None:
                raise WorkError(
                    f"{name} has no gradient, so its channels cannot be scored: call pruner.step() after "
                    "loss.backward(), unfreeze the layer, or name it in ignore."
                )
            product = parameter.detach() * parameter.grad
            others = [other for other in range(product.dim()) if other != dim]
            product = product.sum(dim=others, dtype=torch.float64) if others else product.double()
            parts.append(product if len(positions) == 0 else product[positions])
        if parts:
            gate.index_add_(0, torch.cat([channels for *_, channels in self._plan]), torch.cat(parts))
        return gate.square_()

    def _planned(self, device: torch.device) -> list[tuple[str, int, Tensor, Tensor]]:
        """(parameter, dim, positions along dim or empty for all in order, their channel's place in the flat result)."""
        plan = []
        start = 0
        for group in self.graph.groups.values():
            for part in group.slices:
                if (part.tensor, part.dim) in group.gates:
                    size = self._parameters[part.tensor].shape[part.dim]
                    in_order = len(part.positions) == size and bool((part.positions == torch.arange(size)).all())
                    positions = torch.empty(0, dtype=torch.int64) if in_order else part.positions
                    channels = start + part.channels
                    plan.append((part.tensor, part.dim, positions.to(device), channels.to(device)))
            start += group.width
        return plan

    def removed(self, removals: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
        super().removed(removals, widths)
        self._planned_for = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._planned_for = None
