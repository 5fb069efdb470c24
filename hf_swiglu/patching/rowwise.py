"""Whether a forward may run again in backward, and on a part of its rows, shown from its source.

The forward of a module that takes one tensor is read statement by statement. Each expression is a tensor of the input's
rows, or something that is no input's; what names and attributes stand for is looked up in the module as it is now. Rows
are independent if everything acts on the last dimension alone. A run may be repeated if it writes nothing that outlives
it. Whatever is not known is not shown.
"""

from __future__ import annotations

import ast
import inspect
import types
import weakref
from typing import Any, NamedTuple

from torch import nn

from hf_swiglu.patching.methods import UNKNOWN
from hf_swiglu.patching.recompute import is_every_call_watched
from hf_swiglu.patching.scopes import ROWS, NotShown, Scope
from hf_swiglu.patching.source import NoSource, method_tree

_DEPTH = 4


class Shown(NamedTuple):
    """Why it was not shown; both are empty where it was."""

    not_repeatable: str
    not_rowwise: str


_trees: weakref.WeakKeyDictionary[types.FunctionType, ast.FunctionDef | str] = weakref.WeakKeyDictionary()


def shown(module: nn.Module, original: type[nn.Module]) -> Shown:
    """What the source of `original.forward` shows of `module`, as both are now."""
    reading = _Reading()
    try:
        returned = reading.call(original.forward, [module, ROWS], depth=0)
    except NotShown as reason:
        return Shown(str(reason), str(reason))
    if is_every_call_watched():
        reading.note("hooks, or functions of others, see every module's calls")
    if returned is not ROWS:
        reading.note("its forward returns something else than one tensor of the input's rows")
    return Shown("", reading.reason)


class _Reading:
    """What is found on the way through a forward and the functions that it calls."""

    def __init__(self) -> None:
        self.reason = ""

    def note(self, reason: str) -> None:
        """Rows are not independent, as far as is known; the run may be repeated all the same."""
        self.reason = self.reason or reason

    def call(self, function: Any, arguments: list, depth: int) -> Any:
        """What the function returns for these arguments."""
        if not isinstance(function, types.FunctionType) or depth > _DEPTH:
            raise NotShown("its forward is not a plain function")
        tree = _tree(function)
        parameters = tree.args
        names = [argument.arg for argument in (*parameters.posonlyargs, *parameters.args)]
        defaults = function.__defaults__ or ()
        if len(names) - len(defaults) > len(arguments) or len(arguments) > len(names):
            raise NotShown(f"its {function.__name__} takes {len(names) - 1} arguments")
        values = dict(zip(names[len(names) - len(defaults) :], defaults)) | dict(zip(names, arguments))
        for name in parameters.kwonlyargs:
            values[name.arg] = (function.__kwdefaults__ or {}).get(name.arg, UNKNOWN)
        for extra, empty in ((parameters.vararg, ()), (parameters.kwarg, {})):
            if extra is not None:
                values[extra.arg] = empty
        scope = Scope(self, function, values, depth)
        scope.run(tree.body)
        return scope.result()


def _tree(function: types.FunctionType) -> ast.FunctionDef:
    if inspect.unwrap(function) is not function:
        raise NotShown(f"its {function.__name__} is decorated")
    if function not in _trees:
        try:
            _trees[function] = method_tree(function)
        except NoSource as reason:
            _trees[function] = f"of its {function.__name__}, {reason}"
    tree = _trees[function]
    if isinstance(tree, str):
        raise NotShown(tree)
    return tree
