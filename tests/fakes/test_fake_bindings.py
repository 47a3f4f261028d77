"""The fake has the names, members and signatures of the listing, and refuses everything else."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fakes.fixtures import LISTINGS
from tests.fakes.protocol import Session
from tests.fakes.tensorrt import MODELS, build_fake


def test_the_module_has_the_listed_names_and_no_others(tensorrt: ModuleType) -> None:
    listing = json.loads(LISTINGS[".".join(tensorrt.__version__.split(".")[:2])].read_text())
    assert {name for name in vars(tensorrt) if not name.startswith("__")} == set(listing)
    with pytest.raises(AttributeError):
        _ = tensorrt.nptype


def test_every_class_has_the_listed_members_and_no_others(tensorrt: ModuleType) -> None:
    listing = json.loads(LISTINGS[".".join(tensorrt.__version__.split(".")[:2])].read_text())
    for name, entry in listing.items():
        if entry["kind"] == "class":
            public = {member for member in vars(getattr(tensorrt, name)) if not member.startswith("_")}
            assert public == {member for member in entry["members"] if member[0] != "_"}, name


def test_every_behaviour_belongs_to_a_listed_member() -> None:
    listings = [json.loads(path.read_text()) for path in LISTINGS.values()]
    for name, model in MODELS.items():
        listed = {member for listing in listings for member in listing[name]["members"]}
        for setting in model.settable:
            assert setting in listed, f"{name}.{setting}"
        assert not listed & {"api", "parent", "reference", "ensure_alive", "settable", "special", "public"}, name


def test_removed_members_are_absent_from_11() -> None:
    old, new = (build_fake(LISTINGS[name]) for name in ("10.16", "11.4"))
    assert hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(new.BuilderFlag, "FP16")
    assert hasattr(old, "IInt8Calibrator")
    assert not hasattr(new, "IInt8Calibrator")
    assert hasattr(old.ICudaEngine, "device_memory_size")
    assert not hasattr(new.ICudaEngine, "device_memory_size")


def test_enum_numbers_differ_between_the_majors() -> None:
    old, new = (build_fake(LISTINGS[name]) for name in ("10.16", "11.4"))
    for name, kind in vars(new).items():
        if hasattr(kind, "__members__"):
            for member in kind.__members__:
                if hasattr(getattr(old, name, None), member):
                    assert int(getattr(old, name).__members__[member]) != int(kind.__members__[member])


def test_an_enum_member_is_no_integer(tensorrt: ModuleType) -> None:
    flag = tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    with pytest.raises(TypeError):
        1 << flag
    assert flag != int(flag)
    assert tensorrt.NetworkDefinitionCreationFlag(int(flag)) is flag
    assert tensorrt.float32 is tensorrt.DataType.FLOAT
    with pytest.raises(AttributeError):
        flag.name = "OTHER"


def test_unlisted_attributes_cannot_be_set(session: Session) -> None:
    with pytest.raises(AttributeError):
        session.config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        session.builder.state = 1
    with pytest.raises(AttributeError):
        session.network.num_inputs = 1


def test_arguments_are_checked(session: Session) -> None:
    trt, config = session.trt, session.config
    with pytest.raises(TypeError, match="BuilderFlag wanted, int given"):
        config.set_flag(int(trt.BuilderFlag.TF32))
    with pytest.raises(TypeError, match="BuilderFlag wanted, MemoryPoolType given"):
        config.set_flag(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="pool_size is missing"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="no parameter is called size"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=1)
    with pytest.raises(TypeError, match="an integer is wanted, float given"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)
    with pytest.raises(TypeError, match="str wanted"):
        session.parser.parse_from_file(Path("model.onnx"))
    with pytest.raises(TypeError, match="ProfilingVerbosity wanted"):
        config.profiling_verbosity = 1
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.IBuilderConfig()
    with pytest.raises(TypeError, match="ILogger wanted"):
        trt.Builder(None)


def test_what_is_listed_but_not_modelled_says_so(session: Session) -> None:
    with pytest.raises(NotImplementedError, match=r"INetworkDefinition\.add_input"):
        session.network.add_input("x", session.trt.float32, (1,))
    with pytest.raises(NotImplementedError, match=r"IBuilderConfig\.runtime_platform"):
        _ = session.config.runtime_platform
    with pytest.raises(NotImplementedError, match="Refitter"):
        session.trt.Refitter(None, session.logger)


def test_interfaces_must_be_initialised(tensorrt: ModuleType) -> None:
    class Logger(tensorrt.ILogger):
        def __init__(self) -> None:
            pass

        def log(self, severity: Any, msg: str) -> None: ...

    with pytest.raises(TypeError, match="must be called when overriding __init__"):
        Logger()


def test_interfaces_must_be_implemented(session: Session) -> None:
    class Recorder(session.trt.IErrorRecorder):
        def report_error(self, code: Any, text: str) -> bool:
            return False

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="pure virtual function"):
        session.builder.error_recorder = recorder


def test_objects_of_another_fake_are_refused(session: Session) -> None:
    other = build_fake(LISTINGS["10.16"])
    with pytest.raises(TypeError):
        session.config.set_flag(other.BuilderFlag.TF32)
