"""The ONNX parser as an object: what it reads, and its errors."""

from pathlib import Path
from typing import Any

from tests.fakes import parsing
from tests.fakes.classes import Api, Borrowed, Model
from tests.fakes.interfaces import Callback, Reporting


class OnnxParser(Reporting):
    public = "OnnxParser"
    network = Borrowed("the network given to an OnnxParser")
    logger = Callback("the logger given to an OnnxParser")

    def __init__(self, api: Api, network: Any, logger: Any) -> None:
        super().__init__(api)
        self.network = network
        self.logger = logger
        self._problems: list[parsing.Problem] = []
        self._flags = {api.enums["OnnxParserFlag"].NATIVE_INSTANCENORM}

    def parse_from_file(self, model: str) -> bool:
        if not self.api.machine.plugins_ready:
            raise RuntimeError("init_libnvinfer_plugins(logger, '') must come before parsing")
        definition = self.api.model(self.network)
        if definition.model is not None:
            raise RuntimeError("the network has been filled already: make a new one for another file")
        parsed = parsing.parse(Path(model))
        self._problems += parsed.problems
        for problem in parsed.problems:
            self.log("ERROR", f"In node {problem.node} with name: {problem.node_name}: {problem.code}: {problem.text}")
        if parsed.model is None:
            return False
        definition.fill(parsed.model)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._problems)

    def get_error(self, index: int) -> "ParserError":
        return ParserError(self.api, self._problems[index])

    def clear_errors(self) -> None:
        self._problems.clear()

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in parsing.UNSUPPORTED_OPERATORS

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)


class ParserError(Model):
    public = "ParserError"

    def __init__(self, api: Api, problem: parsing.Problem) -> None:
        super().__init__(api)
        self._problem = problem

    def code(self) -> Any:
        return getattr(self.api.enums["ErrorCode"], self._problem.code)

    def desc(self) -> str:
        return self._problem.text

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 948

    def func(self) -> str:
        return "parseNode"

    def node(self) -> int:
        return self._problem.node

    def node_name(self) -> str:
        return self._problem.node_name

    def node_operator(self) -> str:
        return self._problem.operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


MODELS: tuple[type[Model], ...] = (OnnxParser, ParserError)
