"""A strict fake of the `tensorrt` module, made from a listing of the real bindings; it runs networks on the CPU.

What is modelled:

- the names, members and signatures of the listing, and nothing else; enum numbers that differ between the majors;
- building: strongly typed networks from ONNX files (see `parsing` for what is refused), configuration, optimisation
  profiles, timing caches, progress monitors with nested phases, plans as bytes that depend on nothing but the input;
- running: plans are refused for another version or GPU as TensorRT refuses them; profiles, shapes, addresses and
  streams must be set in order; inference is done by ONNX Runtime when the stream is synchronised (see `cuda`);
- errors as TensorRT gives them: None or False returned, with the text in the error recorder and the logger;
- objects that TensorRT points at (loggers, recorders, monitors, profilers, and the parent of an object) must be kept
  alive by the user: RuntimeError "use after free" otherwise.

Stricter than TensorRT, so that what only happens to work is found out: the profile must be set even if it is 0; the
default stream is refused; STRONGLY_TYPED must be given to 11 too; plugins must be registered before parsing; pybind11
keeps some of the objects alive that the fake drops; a callback must implement its whole interface, and what it raises
comes out instead of being swallowed, KeyboardInterrupt excepted, which cancels a build as in TensorRT; a graph is stale
once the addresses of its context change; inputs that change between enqueue and execution are a race.

Not modelled: plugins, networks defined by calls, refitting, weight streaming, output allocators, shape tensors,
fusion of layers, lack of workspace, real timings, calls from other threads. What is listed and not modelled raises
NotImplementedError.

Assumed, as no TensorRT was at hand: the inspector's keys inside layers of 11 (`Format` and `DataType`, where 10 has
`Format/Datatype`; the rest is from NVIDIA's migration guide), the phases' names, the wording of most messages, and that
a version-compatible plan loads in the other major.
"""

import json
import weakref
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.fakes import building, configuration, context, inspection, interfaces, parser, running
from tests.fakes.classes import Api
from tests.fakes.interfaces import ILogger
from tests.fakes.listing import signatures
from tests.fakes.machine import Faults, Machine

PARTS = (interfaces, configuration, building, parser, running, context, inspection)
MODELS = {model.public: model for part in PARTS for model in part.MODELS}
# The module's names for data types, as NumPy names them.
DATA_TYPE_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}

_apis: "weakref.WeakKeyDictionary[ModuleType, Api]" = weakref.WeakKeyDictionary()


def build_fake(
    listing_path: Path,
    *,
    gpu: str = "NVIDIA H200",
    compute_capability: tuple[int, int] = (9, 0),
    version: str | None = None,
) -> ModuleType:
    """A module with the names of the listing, for one GPU; `version` None is the listing's file name.

    Each call gives a module of its own: objects of one cannot be used with another.
    """
    listing = json.loads(listing_path.read_text(encoding="utf-8"))
    version = version if version is not None else listing_path.stem
    api = Api(listing, version, Machine(gpu, compute_capability), MODELS)
    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # importlib.util.find_spec raises without one
    module.__version__ = version  # type: ignore[attr-defined]
    for name, entry in listing.items():
        setattr(module, name, _public(api, name, entry))
    _apis[module] = api
    return module


def faults(module: ModuleType) -> Faults:
    """What is to go wrong with this fake; set its fields."""
    return machine(module).faults


def machine(module: ModuleType) -> Machine:
    """The GPU of this fake."""
    return _apis[module].machine


def _public(api: Api, name: str, entry: dict[str, Any]) -> Any:
    if entry["kind"] == "class":
        return api.classes[name]
    if entry["kind"] == "enum":
        return api.enums[name]
    if entry["kind"] == "value":
        return getattr(api.enums["DataType"], DATA_TYPE_NAMES.get(name, name.upper()))
    return _function(api, name, entry["signature"])


def _function(api: Api, name: str, entry: list[str]) -> Any:
    # The listing gives the logger as a capsule, which is how pybind11 prints a void pointer.
    overloads = signatures([text.replace("typing_extensions.CapsuleType", "ILogger") for text in entry])

    def call(*args: Any, **kwargs: Any) -> Any:
        if name != "init_libnvinfer_plugins":
            raise NotImplementedError(f"tensorrt.{name} is listed, but the fake does not model it")
        values = api.types.bind(overloads, args, kwargs, name)
        assert isinstance(api.model(values["logger"]), ILogger)
        api.machine.plugins_ready = True
        return True

    call.__name__ = name
    return call
