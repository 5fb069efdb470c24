"""Runs a typer app so that every failure is one line on stderr and an exit code."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table


class CommandError(Exception):
    """A command cannot do what was asked; the message says what, why, and what to do, in one line."""


def run_app(app: typer.Typer, arguments: list[str], name: str) -> int:
    """Run one command; returns the exit code: 2 for a wrong argument, 1 for any other failure."""
    try:
        code = app(arguments or ["--help"], prog_name=name, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(name, "interrupted", 1)
    except CommandError as error:
        return _fail(name, str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):
            # typer's own errors, about the arguments.
            return _fail(name, f"{error.format_message().rstrip('.')}; see {name} --help", 2)
        return _fail(name, f"{type(error).__name__}: {error}", 1)
    # Newer typers return the shells' 130 on Ctrl-C without a message; older ones raise Abort.
    return _fail(name, "interrupted", 1) if code == 130 else code


def show(what: object) -> None:
    """Print a table through rich, which leaves colours out of a pipe, and text as it is, which rich would wrap."""
    if isinstance(what, Table):
        Console().print(what)
    else:
        print(what, flush=True)


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}:", " ".join(message.split()), file=sys.stderr)
    return code
