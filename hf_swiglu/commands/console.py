"""Runs a typer app so that every failure is one line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

Item = TypeVar("Item")


class CommandError(Exception):
    """A command failed; the message states what, why, and what to do, in one line."""


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
            # typer's own errors about arguments.
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else name
            return _fail(name, f"{error.format_message().rstrip('.')}; see {command} --help", 2)
        return _fail(name, f"{type(error).__name__}: {error}", 1)
    # Newer typers return the shells' 130 on Ctrl-C without a message; older ones raise Abort.
    return _fail(name, "interrupted", 1) if code == 130 else code


def show(what: object) -> None:
    """Print a table with rich, without colours in a pipe; other values with `print`, because rich would wrap text."""
    if isinstance(what, Table):
        Console().print(what)
    else:
        print(what, flush=True)


def progress(items: Collection[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on stderr, if that is a terminal, until the last one is done."""
    bar = Console(stderr=True)
    return track(items, what, console=bar, transient=True, disable=not bar.is_terminal)


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}:", " ".join(message.split()), file=sys.stderr)
    return code
