"""Changes to models and classes that happen together, and that an interrupt cannot leave half made.

CPython handles signals, and switches threads, between bytecodes. A change here is a call of a function written in C,
and a list of changes is made by one more: an interrupt comes before all of them or after all of them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple


class Change(NamedTuple):
    """Two calls of functions written in C. `undo` may be called any number of times, and without `do`."""

    do: functools.partial
    undo: functools.partial


def attribute(owner: object, name: str, value: object) -> Change:
    """`owner.name = value`, without the `__setattr__` that modules and configs define in Python."""
    return Change(
        functools.partial(object.__setattr__, owner, name, value),
        functools.partial(object.__setattr__, owner, name, getattr(owner, name)),
    )


def entry(table: dict, key: str, value: object) -> Change:
    """`table[key] = value`"""
    return Change(functools.partial(dict.__setitem__, table, key, value), _restore(table, key))


def removal(table: dict, key: str) -> Change:
    """`table.pop(key, None)`"""
    return Change(functools.partial(dict.pop, table, key, None), _restore(table, key))


def variable(context_variable: ContextVar, value: object) -> Change:
    """`context_variable.set(value)`"""
    return Change(
        functools.partial(context_variable.set, value), functools.partial(context_variable.set, context_variable.get())
    )


def call_all(calls: Iterable[functools.partial]) -> None:
    """Call every one of these functions written in C, with no signal handled in between."""
    deque(map(functools.partial.__call__, list(calls)), maxlen=0)


class Changes:
    """The changes made in a `with` block, undone where an error leaves it; `temporary` ones always.

    Entered twice (`with changes, changes:`) it undoes them also where a second interrupt stops the first undoing.
    """

    def __init__(self, *, temporary: bool = False):
        self._temporary = temporary
        self._undo: list[functools.partial] = []

    def make(self, changes: Iterable[Change]) -> None:
        changes = list(changes)
        self._undo += [change.undo for change in changes]
        call_all(change.do for change in changes)

    def undo(self) -> None:
        call_all(reversed(self._undo))

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._temporary or kind is not None:
            self.undo()


def _restore(table: dict, key: str) -> functools.partial:
    if key in table:
        return functools.partial(dict.__setitem__, table, key, table[key])
    return functools.partial(dict.pop, table, key, None)
