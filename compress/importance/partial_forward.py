"""A forward pass of which a part can be run again, for many copies of a minibatch at once.

The network is exported in evaluation mode with a free batch dimension (`torch.export`). Its operators are then run one
by one: once for the minibatch itself, keeping what later runs start from, and after that only what lies behind a
changed value.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from compress.errors import first_line
from compress.importance.normalisations import BATCH_NORM, CONVOLUTIONS, Normalisations

_ATEN: Final = torch.ops.aten
_ANY_LAYOUT: Final = {_ATEN.view.default: _ATEN.reshape.default}
"""Operators that insist on a memory layout -> the same without."""

_IN_PLACE: Final = {
    _ATEN.relu.default: _ATEN.relu_.default,
    _ATEN.hardtanh.default: _ATEN.hardtanh_.default,
    _ATEN.hardswish.default: _ATEN.hardswish_.default,
    _ATEN.silu.default: _ATEN.silu_.default,
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
}
"""Elementwise operators -> the same, written over the first operand."""

Values = dict[fx.Node, Any]


class NotCuttableError(Exception):
    """The forward pass cannot be run in parts; the message says why."""


class PartialForward:
    """The operators of a network's forward pass in evaluation mode.

    Attributes:
        nodes: the operators in order, without those that no output needs.
        readers: qualified name of a parameter -> the operators that read it.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """
        Args:
            model: in evaluation mode; its weights are read anew at every `start`, its shapes must stay.
            inputs: of the forward pass; the first dimension of every tensor in it is the batch, of 2 or more.

        Raises:
            NotCuttableError: the model cannot be exported, or not with a free batch dimension.
        """
        self._model = model
        free = pytree.tree_map(
            lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None, inputs
        )
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=free).run_decompositions({})
        except Exception as error:  # it fails with anything that the model's forward can raise
            raise NotCuttableError(f"torch.export cannot capture it: {first_line(error)}") from error
        graph = program.graph
        graph.eliminate_dead_code()
        self._constants = program.constants
        self._stored: dict[fx.Node, str] = {}
        self._lifted: dict[fx.Node, str] = {}
        self._inputs: list[fx.Node] = []
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self._stored[node] = str(spec.target)
            elif spec.kind == InputKind.USER_INPUT:
                self._inputs.append(node)
            else:
                self._lifted[node] = str(spec.target)
        self._batch = _batch_symbol(self._inputs)
        strange = [node.name for node in graph.nodes if node.op not in ("placeholder", "call_function", "output")]
        if strange:
            raise NotCuttableError(f"{strange[0]} is no plain operator")
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.readers = {name: list(node.users) for node, name in self._stored.items()}
        self._output = next(node for node in graph.nodes if node.op == "output")
        self._out_spec = program.call_spec.out_spec
        self._norms = Normalisations(self.nodes, self._stored)
        self._overwriting = {node for node in self.nodes if self._may_overwrite(node)}
        self._weights: Values = {}

    # --- what the graph says ------------------------------------------------------------------------------------

    def stored(self, node: Any) -> str | None:
        """Name of the parameter or buffer that `node` stands for, None for anything else."""
        return self._stored.get(node)

    def value_of(self, node: fx.Node) -> fx.Node:
        """The node that holds an operator's tensor: batch normalisation gives a tuple and others of no use."""
        if node.target != BATCH_NORM:
            return node
        return next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)

    def has_no_value(self, node: fx.Node) -> bool:
        """Whether an operator is computed together with the one behind it."""
        return self._norms.computes(node)

    def batch_dims(self, node: fx.Node) -> list[int]:
        """Dimensions of a tensor along which images are counted."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return []
        return [dim for dim, size in enumerate(value.shape) if self._batch in _symbols(size)]

    def bytes_per_image(self, nodes: Collection[fx.Node]) -> int:
        """Size of the largest tensor that the operators give for one image."""
        sizes = [0]
        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                count = 1
                for size in value.shape:
                    count *= self._number(size, 1)
                sizes.append(count * value.dtype.itemsize)
        return max(sizes)

    def behind(self, changed: Collection[fx.Node]) -> list[fx.Node]:
        """`changed` and everything that depends on it, in order; sizes, which follow the batch alone, do not."""
        found = set(changed)
        for node in self.nodes:
            if node not in found and not _is_size(node) and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return [node for node in self.nodes if node in found]

    def before(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        """Operators outside `nodes` whose values `nodes` or the output read."""
        inside = set(nodes)
        read = {source for node in (*nodes, self._output) for source in node.all_input_nodes}
        return {node for node in read if node not in inside and node.op == "call_function" and not _is_size(node)}

    # --- running ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, inputs: tuple[Any, ...], keep: Collection[fx.Node]) -> Values:
        """Run the whole forward pass on a minibatch; returns the values of the nodes in `keep`."""
        # With all names of a shared tensor, for the export may have chosen another one.
        tensors: dict[str, Tensor] = {
            **dict(self._model.named_parameters(remove_duplicate=False)),
            **dict(self._model.named_buffers(remove_duplicate=False)),
        }
        self._weights = {node: _channels_last(tensors[name].detach()) for node, name in self._stored.items()}
        for node, name in self._lifted.items():
            self._weights[node] = self._constants[name]
        self._norms.prepare(self._weights)
        given = dict(zip(self._inputs, map(_channels_last, pytree.tree_leaves(inputs)), strict=True))
        images = next(len(given[node]) for node in self._inputs if self.batch_dims(node))
        values: Values = dict(given)
        kept = set(keep)
        last = self._last_readers(self.nodes)
        for node in self.nodes:
            if self._norms.computes(node):
                continue
            values[node] = self._call(node, values, {}, 1, images)
            for source in self._norms.sources(node):
                # What nobody reads any more makes room.
                if (
                    source in values
                    and source not in kept
                    and last.get(source) is node
                    and source.op == "call_function"
                ):
                    del values[source]
        return {node: values[node] for node in kept | set(self._inputs) if node in values}

    def rerun(
        self,
        nodes: Sequence[fx.Node],
        known: Mapping[fx.Node, Any],
        factors: Mapping[fx.Node, Tensor],
        *,
        copies: int,
        images: int,
    ) -> Any:
        """Run `nodes` again for several copies of the minibatch.

        Args:
            nodes: in order, as `behind` gives them.
            known: values of the minibatch, from `start`.
            factors: node -> (copies, ...), what each copy multiplies the node's value with; (copies, 1, C, 1, 1) for an
                image of channels.

        Returns:
            The model's output for copies x images, the images of the first copy first.
        """
        values: Values = {}
        inside = set(nodes)
        # Memory is used again while it is still in the cache; autograd would need all of it.
        reuse = not torch.is_grad_enabled()
        last = self._last_readers(nodes) if reuse else {}
        for node in nodes:
            if self._norms.computes(node):
                continue
            sources = self._norms.sources(node)
            fresh = any(source in values for source in sources)
            if fresh:
                overwrite = reuse and node in self._overwriting and node.args[0] in inside
                values[node] = self._call(node, values, known, copies, images, overwrite=overwrite)
                for source in sources:
                    if last.get(source) is node:
                        values.pop(source, None)
            factor = factors.get(node)
            if factor is not None:
                # Where nothing before it has changed the operator itself need not be run again.
                value = values[node].unflatten(0, (copies, images)) if fresh else known[node].unsqueeze(0)
                values[node] = (value * factor).flatten(0, 1)
        for node in self.outputs():
            if node not in inside:
                values[node] = self._tiled(node, known[node], copies)
        leaves = pytree.tree_leaves(self._output.args[0])
        return pytree.tree_unflatten([values.get(leaf, leaf) for leaf in leaves], self._out_spec)

    def outputs(self) -> list[fx.Node]:
        """The nodes whose values the model returns."""
        return [node for node in pytree.tree_leaves(self._output.args[0]) if isinstance(node, fx.Node)]

    def _last_readers(self, nodes: Sequence[fx.Node]) -> Values:
        """Node -> the last of `nodes` that reads its value; outputs are read to the end."""
        last = {
            source: node for node in nodes if not self._norms.computes(node) for source in self._norms.sources(node)
        }
        for node in self.outputs():
            last.pop(node, None)
        return last

    def _may_overwrite(self, node: fx.Node) -> bool:
        """Whether nobody else can want the first operand: its one reader is here, and it is memory of its own."""
        if node.target not in _IN_PLACE:
            return False
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) > 1 or node.args.count(source) > 1:
            return False
        maker = source.args[0] if source.target is operator.getitem else source
        own = (*CONVOLUTIONS, BATCH_NORM, _ATEN.add.Tensor, _ATEN.mul.Tensor)
        if not isinstance(maker, fx.Node) or maker.target not in own:
            return False
        before, after = source.meta["val"], node.meta["val"]
        return before.shape == after.shape and before.dtype == after.dtype

    def _call(
        self,
        node: fx.Node,
        values: Values,
        known: Mapping[fx.Node, Any],
        copies: int,
        images: int,
        *,
        overwrite: bool = False,
    ) -> Any:
        def value(source: fx.Node) -> Any:
            if source in values:
                return values[source]
            if source in self._weights:
                return self._weights[source]
            if _is_size(source):
                return self._number(source.meta["val"], copies * images)
            values[source] = self._tiled(source, known[source], copies)
            return values[source]

        if _is_size(node):
            return self._number(node.meta["val"], copies * images)
        if node in self._norms:
            return (self._norms.compute(node, value),)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        if overwrite:
            return _IN_PLACE[target](*args, **kwargs)
        return _ANY_LAYOUT.get(target, target)(*args, **kwargs)

    def _tiled(self, node: fx.Node, value: Any, copies: int) -> Any:
        """A value of the minibatch, once for each copy."""
        dims = self.batch_dims(node)
        if copies == 1 or not dims or not isinstance(value, Tensor):
            return value
        if len(dims) > 1:
            raise NotCuttableError(f"{node.name} counts images along several dimensions")
        return torch.cat([value] * copies, dims[0])

    def _number(self, size: Any, images: int) -> Any:
        """A size of the exported graph for so many images."""
        if not isinstance(size, torch.SymInt):
            return size
        return int(size.node.expr.subs({self._batch: images}))


def _batch_symbol(inputs: Sequence[fx.Node]) -> Any:
    sizes = [node.meta["val"].shape[0] for node in inputs if isinstance(node.meta["val"], Tensor)]
    free: set[Any] = set().union(*map(_symbols, sizes))
    if len(free) != 1 or not all(map(_symbols, sizes)):
        raise NotCuttableError("the forward pass fixes the number of images")
    return free.pop()


def _channels_last(value: Any) -> Any:
    """A feature map or filter in the layout that computes fastest on CPUs and tensor cores."""
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _symbols(size: Any) -> set[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat)
