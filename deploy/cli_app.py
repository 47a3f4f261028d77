"""The command-line application, and the options that its commands share."""

from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

COMMANDS: Final = (
    *("run", "prune", "export", "engine", "compare", "bench", "triton", "report"),
    *("correlate", "inspect", "doctor"),
)
"""In the order of the work, as --help lists them; the modules that bring them are imported in another."""


class _InOrder(TyperGroup):
    def list_commands(self, _: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    name="espalier",
    cls=_InOrder,
    help="Prune a trained vision network, train it back, export it, and prove with a clock that it is faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataSource = Annotated[
    str,
    typer.Option(help="digits, glyphs, cifar10:/path, imagefolder:/path, segmentation:/path, package.module:function."),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything, and show the traceback of an error.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="Let the checkpoint's factory import this module; repeatable."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of one inference.  \\[default: PyTorch's number]")
]


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
