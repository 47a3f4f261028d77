"""Finds every attribute of TensorRT that a source file touches, by following its objects through the syntax tree.

An object of TensorRT enters the code through the module (`trt.Builder(...)`), through a method whose result the
listing names, or through a parameter, attribute or function whose annotation names it ("tensorrt.Builder"). What has
no annotation, or Any, may be one as well: reading an attribute of it is a problem that the walk reports.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NOT_LISTED = {("", "__version__")}
"""Of the Python package, not of the bindings that the listings describe."""

CPP_NAMES = {"nvonnxparser::IParserError": "ParserError"}
"""Results that the bindings' signatures name by their C++ class."""

Listing = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What an expression is: "module", "class", "instance", "list" or "method" of TensorRT, "unknown", or "other"."""

    what: str
    name: str = ""


MODULE, UNKNOWN, OTHER = Kind("module"), Kind("unknown"), Kind("other")
Scope = dict[str, Kind]


@dataclass
class Found:
    """(class, member) with "" for the module itself, each with its line; and what could not be followed."""

    touched: dict[tuple[str, str], int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def missing(found: Found, listing: Listing) -> list[str]:
    """What was touched and is not in the listing."""
    return sorted(
        f"line {line}: tensorrt.{f'{owner}.' if owner else ''}{member}"
        for (owner, member), line in found.touched.items()
        if (owner, member) not in NOT_LISTED and not _exists(owner, member, listing)
    )


def walk(sources: Mapping[str, str], listing: Listing) -> dict[str, Found]:
    """File -> what it touches; the listing tells what TensorRT's methods return."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    results = {
        node.name: kind
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (kind := _annotated(node.returns)) not in (OTHER, UNKNOWN)
    }
    return {name: _Walk(listing, results).file(tree) for name, tree in trees.items()}


def _exists(owner: str, member: str, listing: Listing) -> bool:
    if not owner:
        return member in listing
    entry = listing.get(owner)
    if entry is None:
        return False
    return member in entry.get("members", ()) or any(_exists(base, member, listing) for base in entry.get("bases", ()))


def _annotated(annotation: ast.expr | None) -> Kind:
    if annotation is None:
        return UNKNOWN
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    if named := re.match(r"tensorrt\.(\w+)", str(text)):
        return Kind("instance", named[1])
    return {"ModuleType": MODULE, "Any": UNKNOWN}.get(str(text), OTHER)


class _Walk:
    def __init__(self, listing: Listing, results: Mapping[str, Kind]) -> None:
        self._listing = listing
        self._results = results
        self._attributes: Scope = {}  # of our own objects, by the attribute's name alone
        self._found = Found()

    def file(self, tree: ast.Module) -> Found:
        self._block(tree.body, {})  # learns what the attributes of our own objects hold
        self._found = Found()
        self._block(tree.body, {})
        return self._found

    def _block(self, body: list[ast.stmt], scope: Scope) -> None:
        for statement in body:
            self._statement(statement, scope)

    def _statement(self, node: ast.stmt, scope: Scope) -> None:
        match node:
            case ast.FunctionDef():
                self._function(node, scope)
            case ast.ClassDef():
                self._class(node, scope)
            case ast.Import(names=names):
                scope |= {item.asname or item.name: MODULE for item in names if item.name == "tensorrt"}
            case ast.Assign(targets=targets, value=value):
                kind = self._kind(value, scope)
                for target in targets:
                    self._assign(target, kind, scope)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                kind = _annotated(annotation)
                if value is not None:
                    self._kind(value, scope)
                self._assign(target, kind, scope)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self._assign(target, self._element(iterable, scope), scope)
                self._block(body + orelse, scope)
            case ast.With(items=items, body=body):
                for item in items:
                    kind = self._kind(item.context_expr, scope)
                    if item.optional_vars is not None:
                        self._assign(item.optional_vars, kind, scope)
                self._block(body, scope)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self._block(body + [inner for handler in handlers for inner in handler.body] + orelse + final, scope)
            case _:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.stmt):
                        self._statement(child, scope)
                    elif isinstance(child, ast.expr):
                        self._kind(child, scope)

    def _function(self, node: ast.FunctionDef, scope: Scope) -> None:
        inner = dict(scope)
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for parameter in parameters:
            own = parameter.arg in ("self", "cls")
            inner[parameter.arg] = OTHER if own else _annotated(parameter.annotation)
        for default in [*node.args.defaults, *(item for item in node.args.kw_defaults if item is not None)]:
            self._kind(default, scope)
        self._block(node.body, inner)

    def _class(self, node: ast.ClassDef, scope: Scope) -> None:
        bases = [self._kind(base, scope) for base in node.bases]
        for kind in bases:
            if kind.what == "class":  # TensorRT calls what a subclass of its own defines by these names
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        self._touch(kind.name, method.name, method)
        self._block(node.body, dict(scope))

    def _assign(self, target: ast.expr, kind: Kind, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                # None first and an object later, or the other way round: it may be the object wherever it is read.
                if kind != OTHER or name not in scope:
                    scope[name] = kind
            case ast.Attribute(attr=name):
                owner = self._kind(target.value, scope)
                if owner.what in ("instance", "class", "module"):
                    self._member(owner, target)
                elif kind != OTHER:
                    self._attributes[name] = kind
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._assign(part, OTHER, scope)

    def _kind(self, node: ast.expr, scope: Scope) -> Kind:
        match node:
            case ast.Name(id=name):
                return scope.get(name, OTHER)
            case ast.Attribute(value=value, attr=name):
                owner = self._kind(value, scope)
                if owner == UNKNOWN:
                    self._problem(node, f"{ast.unparse(node)} is read of a value without a type: annotate it")
                    return UNKNOWN
                if owner.what in ("module", "class", "instance"):
                    return self._member(owner, node)
                return self._attributes.get(name, OTHER)
            case ast.Call():
                return self._call(node, scope)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node, scope)
            case ast.Lambda(args=arguments, body=body):
                return self._kind(body, scope | {item.arg: UNKNOWN for item in arguments.args})
            case _:
                kinds = [
                    self._kind(child, scope) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)
                ]
                if isinstance(node, ast.IfExp | ast.BoolOp):
                    return next((kind for kind in kinds if kind != OTHER), OTHER)
                return OTHER

    def _call(self, node: ast.Call, scope: Scope) -> Kind:
        function = self._kind(node.func, scope)
        arguments = [self._kind(item, scope) for item in (*node.args, *(keyword.value for keyword in node.keywords))]
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in ("getattr", "hasattr", "setattr") and arguments and arguments[0] not in (OTHER,):
            self._problem(node, f"{ast.unparse(node)} hides which attribute it reads: write it out")
        if function.what == "class":
            return Kind("instance", function.name) if "bases" in self._listing.get(function.name, {}) else OTHER
        if function.what == "method":
            return self._returned(function.name)
        return self._results.get(called, OTHER)

    def _comprehension(self, node: ast.expr, scope: Scope) -> Kind:
        inner = dict(scope)
        for generator in node.generators:  # type: ignore[attr-defined]
            self._assign(generator.target, self._element(generator.iter, inner), inner)
            for condition in generator.ifs:
                self._kind(condition, inner)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]  # type: ignore[attr-defined]
        kinds = [self._kind(part, inner) for part in parts]
        return Kind("list", kinds[-1].name) if kinds[-1].what == "instance" else OTHER

    def _element(self, iterable: ast.expr, scope: Scope) -> Kind:
        kind = self._kind(iterable, scope)
        return Kind("instance", kind.name) if kind.what == "list" else OTHER

    def _member(self, owner: Kind, node: ast.Attribute) -> Kind:
        self._touch(owner.name, node.attr, node)
        entry = self._listing.get(node.attr if owner == MODULE else owner.name, {})
        if owner == MODULE:
            return Kind("class", node.attr) if entry.get("kind") in ("class", "enum") else OTHER
        if entry.get("kind") != "class":
            return OTHER
        signature = entry["members"].get(node.attr)
        text = signature[0] if isinstance(signature, list) else str(signature)
        _, arrow, result = text.partition(" -> ")
        return Kind("method", result) if arrow else OTHER

    def _returned(self, text: str) -> Kind:
        """What a signature's result is, as in "tensorrt_bindings.tensorrt.ITimingCache" and "list[int]"."""
        text = CPP_NAMES.get(text, text).replace("tensorrt_bindings.tensorrt.", "")
        listed = re.fullmatch(r"list\[(\w+)\]", text)
        name = listed[1] if listed else text
        if self._listing.get(name, {}).get("kind") == "class":
            return Kind("list" if listed else "instance", name)
        return UNKNOWN if "::" in text else OTHER

    def _touch(self, owner: str, member: str, node: ast.AST) -> None:
        self._found.touched.setdefault((owner, member), node.lineno)  # type: ignore[attr-defined]

    def _problem(self, node: ast.expr, text: str) -> None:
        self._found.problems.append(f"line {node.lineno}: {text}")


def touching(sources: Mapping[str, str]) -> Iterator[str]:
    """The files that import TensorRT, by whatever way."""
    return (name for name, source in sources.items() if re.search(r"\bimport_tensorrt\b|\bimport tensorrt\b", source))
