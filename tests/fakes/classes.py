"""The public classes and enums of the fake, made from a listing; behaviour comes from models that stand behind them.

A *handle* is the object that a user of the module holds: it has the listed members and nothing else. A *model* is the
object behind it, which has the behaviour as plain Python methods and attributes of the same names. What is listed but
not modelled raises NotImplementedError, so that nothing succeeds silently.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from tests.fakes.enums import make_enum
from tests.fakes.listing import MismatchError, Signature, Types, signatures
from tests.fakes.machine import Machine

READ_ONLY = "property (read-only)"
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
STATIC_VALUES = {("Dims", "MAX_DIMS"): 8, ("IErrorRecorder", "MAX_DESC_LENGTH"): 127}
# bytearray gives IHostMemory the buffer protocol (Python 3.11 has no other way); the rest of it is hidden.
HIDDEN_OPERATORS = ("__len__", "__iter__", "__getitem__", "__contains__", "__add__", "__mul__", "__setitem__")


class Borrowed:
    """A handle that TensorRT's C++ side points at without keeping it alive: the user must.

    pybind11 does keep some of these alive, but not along every path; the fake keeps none, so code that relies on it
    is found out.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = "_borrowed_" + name

    def __get__(self, model: "Model | None", owner: type) -> Any:
        if model is None:
            return self
        reference = model.__dict__.get(self._name)
        if reference is None:
            return None
        handle = reference()
        if handle is None:
            raise RuntimeError(f"use after free: {self._what} was garbage-collected while TensorRT still used it")
        return handle

    def __set__(self, model: "Model", handle: Any) -> None:
        model.__dict__[self._name] = None if handle is None else weakref.ref(handle)


class Model:
    """Behaviour behind one handle.

    Subclasses name their public class, the types of properties that can be set, and special methods that the handle
    passes on. `parent` is where errors go if the object has no recorder or logger of its own.
    """

    public: str
    settable: ClassVar[Mapping[str, str]] = {}
    special: ClassVar[Sequence[str]] = ()

    def __init__(self, api: "Api", parent: "Model | None" = None) -> None:
        self.api = api
        self.parent = parent
        self.reference: weakref.ref[Any] | None = None

    def ensure_alive(self) -> None:
        """Raises RuntimeError if something that this object points at is gone."""
        for kind in type(self).__mro__:
            for name, attribute in vars(kind).items():
                if isinstance(attribute, Borrowed) and (handle := getattr(self, name)) is not None:
                    self.api.model(handle).ensure_alive()


class Api:
    """The classes of one fake module, and the way between handles and models.

    `version` is TensorRT's, `machine` the GPU, `models` are by public name.
    """

    def __init__(
        self, listing: Mapping[str, Any], version: str, machine: Machine, models: Mapping[str, type[Model]]
    ) -> None:
        self.version = version
        self.machine = machine
        self.major = int(version.partition(".")[0])
        self.models = models
        self.enums: dict[str, Any] = {}
        self.classes: dict[str, type] = {}
        self.named: dict[str, type] = {}
        self._states: dict[str, Any] = {}
        self.types = Types(self.named, lambda sizes: self.expose(models["Dims"](self, sizes)))  # type: ignore[call-arg]
        for name, entry in listing.items():
            if entry["kind"] == "enum":
                self.named[name] = self.enums[name] = make_enum(name, entry["members"], self.major)
        severity = make_enum("ILogger.Severity", SEVERITIES, self.major)
        self.named["ILogger.Severity"] = self.named["Severity"] = self.enums["Severity"] = severity
        self._declare(listing)

    def _declare(self, listing: Mapping[str, Any]) -> None:
        waiting = {name: entry for name, entry in listing.items() if entry["kind"] == "class"}
        while waiting:
            for name, entry in list(waiting.items()):
                bases = [base for base in entry["bases"] if base in listing]
                if all(base in self.classes for base in bases):
                    self._declare_class(name, entry["members"], tuple(self.classes[base] for base in bases))
                    del waiting[name]

    def _declare_class(self, name: str, members: Mapping[str, Any], bases: tuple[type, ...]) -> None:
        namespace: dict[str, Any] = {"__module__": "tensorrt", "__qualname__": name, "__slots__": ()}
        if not bases:
            namespace["__slots__"] = ("state", "__weakref__")
            bases = (bytearray,) if name == "IHostMemory" else ()
        if name == "IHostMemory":
            namespace |= dict.fromkeys(HIDDEN_OPERATORS)
            namespace |= {"__bool__": lambda self: True, "__getattribute__": _hiding(frozenset(members))}
        model = self.models.get(name)
        for member, entry in members.items():
            namespace[member] = self._member(name, member, entry)
        for special in model.special if model else ():
            namespace[special] = self._special(special)
        if "__eq__" in namespace:
            namespace["__hash__"] = None
        made = HandleType(name, bases, namespace)
        if "state" in vars(made):
            self._states[name] = vars(made)["state"]
            type.__delattr__(made, "state")  # the slot stays usable by its descriptor, and has no public name
        else:
            self._states[name] = self._states[bases[0].__name__]
        made._is_initialised = self._is_initialised(name)  # type: ignore[attr-defined]
        self.classes[name] = self.named[name] = made

    def _member(self, name: str, member: str, entry: Any) -> Any:
        if member == "__init__":
            return self._constructor(name, entry)
        if (name, member) in STATIC_VALUES:
            return StaticValue(STATIC_VALUES[name, member])
        if member == "Severity":
            return self.enums["Severity"]
        if entry == "method":  # the listing's word for the severities that ILogger repeats
            return getattr(self.enums["Severity"], member)
        if entry == "property" or entry == READ_ONLY:
            return self._property(name, member, read_only=entry == READ_ONLY)
        return self._method(name, member, signatures(entry))

    def _constructor(self, name: str, entry: Any) -> Callable[..., None]:
        overloads = None if entry == "method" else signatures(entry)

        def construct(handle: Any, *args: Any, **kwargs: Any) -> None:
            if overloads is None:
                raise TypeError(f"tensorrt.{name}: No constructor defined!")
            if name not in self.models:
                raise NotImplementedError(f"tensorrt.{name} is listed, but the fake does not model it")
            values = self.types.bind(overloads, args, kwargs, f"{name}.__init__")
            self._attach(handle, self.models[name](self, **values))

        return construct

    def _method(self, name: str, member: str, overloads: Sequence[Signature]) -> Callable[..., Any]:
        def call(handle: Any, *args: Any, **kwargs: Any) -> Any:
            model = self.model(handle)
            implementation = getattr(model, member, None)
            if implementation is None:
                raise _not_modelled(name, member)
            values = self.types.bind(overloads, args, kwargs, f"{name}.{member}")
            handles = [value for value in values.values() if isinstance(type(value), HandleType)]
            for one in (model, *map(self.model, handles)):
                one.ensure_alive()
            return self.expose(implementation(**values))

        call.__name__ = member
        return call

    def _property(self, name: str, member: str, *, read_only: bool) -> property:
        def get(handle: Any) -> Any:
            model = self.model(handle)
            if not hasattr(type(model), member) and member not in vars(model):
                raise _not_modelled(name, member)
            model.ensure_alive()
            return self.expose(getattr(model, member))

        def put(handle: Any, value: Any) -> None:
            model = self.model(handle)
            if member not in model.settable:
                raise _not_modelled(name, member)
            try:
                setattr(model, member, self.types.convert(model.settable[member], value))
            except MismatchError as error:
                raise TypeError(f"{name}.{member}: {error}") from None

        return property(get, None if read_only else put)

    def _special(self, member: str) -> Callable[..., Any]:
        def call(handle: Any, *args: Any) -> Any:
            return getattr(self.model(handle), member)(*args)

        return call

    def _is_initialised(self, name: str) -> Callable[[Any], bool]:
        def check(handle: Any) -> bool:
            try:
                self._states[name].__get__(handle)
            except AttributeError:
                return False
            return True

        return check

    def _attach(self, handle: Any, model: Model) -> None:
        self._states[model.public].__set__(handle, model)
        model.reference = weakref.ref(handle)

    def model(self, handle: Any) -> Any:
        """The model behind a handle of this module."""
        listed = next(kind for kind in type(handle).__mro__ if self.classes.get(kind.__name__) is kind)
        return self._states[listed.__name__].__get__(handle)

    def expose(self, value: Any) -> Any:
        """Handles in place of models; one model has one handle at a time."""
        if isinstance(value, list):
            return [self.expose(item) for item in value]
        if not isinstance(value, Model):
            return value
        handle = value.reference() if value.reference is not None else None
        if handle is None:
            kind = self.classes[value.public]
            handle = kind.__new__(kind)
            if isinstance(handle, bytearray):
                bytearray.__init__(handle, value.data)  # type: ignore[attr-defined]
            self._attach(handle, value)
        return handle


class HandleType(type):
    """Refuses instances whose class overrides `__init__` without calling the base's, as pybind11's metaclass does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not cls._is_initialised(made):  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return made


class StaticValue:
    """A constant of a class that cannot be set."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __get__(self, handle: Any, owner: type) -> int:
        return self._value

    def __set__(self, handle: Any, value: Any) -> None:
        raise AttributeError("can't set attribute")


def _hiding(members: frozenset[str]) -> Callable[[Any, str], Any]:
    def get(handle: Any, name: str) -> Any:
        if name in members or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(handle, name)
        raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute '{name}'")

    return get


def _not_modelled(name: str, member: str) -> NotImplementedError:
    return NotImplementedError(f"tensorrt.{name}.{member} is listed, but the fake does not model it")
