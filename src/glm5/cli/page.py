"""`python -m glm5.cli.page`: docs/cli.md, made from the signatures of the commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo

from glm5.cli.app import app

_HEAD = """# The command line

Made by `python -m glm5.cli.page > docs/cli.md`; a test compares it with the commands. `python -m glm5` is the
same as `glm5`. What a user can act on is one line on stderr and exit code 2; Ctrl-C gives 130.
"""
_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


def page() -> str:
    """Markdown: each command with its sentence, arguments and options."""
    commands = [command.callback for command in app.registered_commands]
    return "\n".join([_HEAD, *(_command(command) for command in commands if command is not None)])


def _command(command: Callable[..., Any]) -> str:
    hints = get_type_hints(command, include_extras=True)
    parameters = [(p, hints[p.name]) for p in inspect.signature(command).parameters.values()]
    usage = [f"glm5 {command.__name__}"]
    usage += [p.name.upper() for p, hint in parameters if isinstance(_info(hint), ArgumentInfo)]
    rows = "\n".join(_row(p, hint) for p, hint in parameters)
    return (
        f"## {command.__name__}\n{inspect.getdoc(command)}\n\n    {' '.join(usage)} [OPTIONS]\n\n"
        f"| | | default |\n|---|---|---|\n{rows}\n"
    )


def _info(hint: Any) -> Any:
    return hint.__metadata__[0]


def _row(parameter: inspect.Parameter, hint: Any) -> str:
    info = _info(hint)
    if isinstance(info, ArgumentInfo):
        names = f"`{parameter.name.upper()}`"
    else:
        # Inside Annotated the first name is where elsewhere the default is.
        first = (info.default,) if isinstance(info.default, str) else ()
        spelled = (*first, *(info.param_decls or ())) or (f"--{parameter.name.replace('_', '-')}",)
        value = info.metavar or _VALUES[_kind(get_args(hint)[0])]
        names = ", ".join(f"`{name} {value}`".replace(" `", "`") for name in spelled)
    known = parameter.default not in (None, False, inspect.Parameter.empty)
    default = f"`{parameter.default}`" if known else ""
    return f"| {names} | {info.help} | {default} |"


def _kind(hint: Any) -> type:
    """The type of one value: of `list[str] | None` it is str."""
    while members := [member for member in get_args(hint) if member is not NoneType]:
        hint = members[0]
    return hint if isinstance(hint, type) else str


if __name__ == "__main__":
    print(page(), end="")
