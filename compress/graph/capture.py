"""A forward pass as a graph of ATen operators, recorded while it runs on fake tensors.

What is recorded are the calls as the model makes them (`aten.conv2d`, `aten.batch_norm`, `aten.linear`), before PyTorch
takes composite operators apart: what `torch.export` gives too, in a quarter of its time. Modules that users describe
themselves (`compress.graph.custom`) are recorded as one call each, whatever they call inside.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Capture:
    """One forward pass.

    Attributes:
        graph: placeholders for parameters, buffers, inputs and constants, operators in the order of their calls, one
            output. A node's value, a fake tensor or a sequence of them, is its `meta["val"]`; its `meta["module"]`
            names the module in whose forward pass it stands.
        parameters, buffers: placeholder -> name of the tensor. A tensor under several names goes by the first.
        inputs: placeholders of the example inputs.
    """

    graph: fx.Graph
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    inputs: frozenset[str]

    @property
    def live(self) -> set[str]:
        """Names of the parameters that an operator reads."""
        return {self.parameters[node.name] for node in self.graph.nodes if node.name in self.parameters and node.users}


Forwards = Mapping[nn.Module, Callable[..., Any]]
"""Modules, and what is run when they are called."""


@dataclass(frozen=True)
class ModuleCall:
    """A module that is recorded as one call.

    Attributes:
        name: its qualified name.
        module: of the model that was captured.
        spec: how the arguments, (args, kwargs), are put together from their leaves.
    """

    name: str
    module: nn.Module
    spec: pytree.TreeSpec


def module_call(call: ModuleCall, leaves: Sequence[Any], tensors: Mapping[str, Any]) -> Any:
    """Target of the node of a `ModuleCall`, never run.

    Args:
        leaves: of the call's arguments.
        tensors: the module's parameters and buffers by their names in it.
    """
    raise NotImplementedError


@contextmanager
def forwards_replaced(forwards: Forwards) -> Iterator[None]:
    """Run these in place of the modules' own forward passes; hooks run as ever."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]
        for module, forward in own.items():
            vars(module)["forward"] = forward


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Let attention modules run as the operators that they consist of, not as the one that PyTorch has for all."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def capture(model: nn.Module, mode: FakeTensorMode, inputs: Sequence[Any], whole: Forwards) -> Capture:
    """Run `model`, whose tensors are fake ones of `mode`, on `inputs`, fake too, and record what it does.

    Args:
        whole: modules to be recorded as one call each.

    Raises:
        TypeError: it returns something in which tensors cannot be found.
        Exception: whatever its forward pass raises; PyTorch's own where that decides by the values of tensors.
    """
    recorder = _Recorder()
    parameters = recorder.placeholders(model.named_parameters())
    buffers = recorder.placeholders(model.named_buffers())
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    given = recorder.placeholders((str(position), leaf) for position, leaf in enumerate(leaves))
    names = {module: name for name, module in model.named_modules()}
    recorded = {module: recorder.recorded(names[module], module, forward) for module, forward in whole.items()}
    enter, leave = recorder.enter(names), recorder.leave
    # In inference mode composite operators arrive whole; otherwise autograd's part of PyTorch takes them apart first.
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with torch.inference_mode(), without_fused_attention(), forwards_replaced(recorded), mode, recorder:
            outputs = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Capture(recorder.finished(outputs), parameters, buffers, frozenset(given))


class _Recorder(TorchDispatchMode):
    """Writes down every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._makers: dict[int, fx.Node] = {}  # id of a tensor -> the node that made it, or changed it, last
        self._alive: list[Tensor] = []  # an id belongs to a tensor only while that lives
        self._first_call: fx.Node | None = None
        self._inside = False  # a module that is recorded whole
        self._modules = [""]  # whose forward passes are open, the innermost last

    def placeholders(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        """A node for each tensor, which was there before: name of the node -> name of the tensor."""
        return {self._placeholder(tensor).name: name for name, tensor in tensors}

    def enter(self, names: Mapping[nn.Module, str]) -> Callable[..., None]:
        """A hook that notes whose forward pass begins."""

        def hook(module: nn.Module, _: Any) -> None:
            self._modules.append(names.get(module, self._modules[-1]))

        return hook

    def leave(self, *_: Any) -> None:
        """A hook that notes that the innermost forward pass ends."""
        self._modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        arguments = (args, kwargs or {})
        nodes = pytree.tree_map_only(Tensor, self._maker, arguments) if not self._inside else None
        with torch.inference_mode(False), torch.no_grad():
            result = func(*args, **arguments[1])
        if nodes is not None:
            self._record(func, nodes, result, result)
        return result

    def recorded(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass of `module` that writes down one call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
            nodes = pytree.tree_map_only(Tensor, self._maker, (leaves, dict(tensors)))
            self._inside = True
            try:
                result = forward(*args, **kwargs)
            finally:
                self._inside = False
            self._record(
                module_call, ((ModuleCall(name, module, spec), *nodes), {}), result, pytree.tree_leaves(result)
            )
            return result

        return call

    def _record(self, target: Any, arguments: Any, result: Any, parts: Any) -> None:
        """Write down a call, and which node makes each of the `parts` of its result."""
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return  # a question about a tensor: its device, its size
        node = self._graph.create_node("call_function", target, *arguments)
        node.meta |= {"val": result, "module": self._modules[-1]}
        self._first_call = self._first_call or node
        if isinstance(result, Tensor):
            self._made(result, node)
            return
        for position, part in enumerate(parts):
            if isinstance(part, Tensor):
                item = self._graph.call_function(operator.getitem, (node, position))
                item.meta["val"] = part
                self._made(part, item)

    def finished(self, outputs: Any) -> fx.Graph:
        """The graph with its output."""
        leaves = pytree.tree_leaves(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise TypeError(f"it returns a {type(leaf).__name__}, in which tensors cannot be found")
        self._graph.output(tuple(self._maker(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
        return self._graph

    def _maker(self, tensor: Tensor) -> fx.Node:
        # A constant, kept neither as parameter nor as buffer, is met here for the first time.
        return self._makers.get(id(tensor)) or self._placeholder(tensor)

    def _placeholder(self, tensor: Tensor) -> fx.Node:
        if self._first_call is None:
            node = self._graph.placeholder(f"stored_{len(self._alive)}")
        else:
            with self._graph.inserting_before(self._first_call):
                node = self._graph.placeholder(f"constant_{len(self._alive)}")
        node.meta |= {"val": tensor, "module": self._modules[-1]}
        self._made(tensor, node)
        return node

    def _made(self, tensor: Tensor, node: fx.Node) -> None:
        self._makers[id(tensor)] = node
        self._alive.append(tensor)
