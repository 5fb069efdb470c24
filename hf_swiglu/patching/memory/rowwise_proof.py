"""Whether a forward may run again in backward, and on a part of its rows, shown from its source: results and reasons.

"Shown" means proved from the source. The forward of a module that takes one tensor is read statement by statement. Each
expression is a tensor with the input's rows, or does not depend on the input; the values of names and attributes are
looked up in the module in its present state. Rows are independent if every operator acts on the last dimension alone. A
run may be repeated if it has no side effects. Code with unknown effects is not shown.
"""

from __future__ import annotations

import ast
import inspect
import types
import weakref
from typing import Any, NamedTuple

from torch import nn

from hf_swiglu.patching.memory.recompute import has_user_global_hook, is_every_call_intercepted
from hf_swiglu.patching.memory.source_evaluation import ROWS, NotShown, Scope
from hf_swiglu.patching.recognition.method_source import NoSource, method_tree
from hf_swiglu.patching.recognition.methods import UNKNOWN

_DEPTH = 4


class Shown(NamedTuple):
    """Why a property was not shown; empty where it was."""

    not_repeatable: str
    not_rowwise: str


_trees: weakref.WeakKeyDictionary[types.FunctionType, ast.FunctionDef | str] = weakref.WeakKeyDictionary()


def shown(module: nn.Module, original: type[nn.Module]) -> Shown:
    """The properties that the source of `original.forward` shows for `module`, in their present state."""
    if has_user_global_hook():
        reason = "every module has a user-defined hook"
        return Shown(reason, reason)
    reading = _Reading()
    try:
        returned = reading.call(original.forward, [module, ROWS], depth=0)
    except NotShown as reason:
        return Shown(str(reason), str(reason))
    if is_every_call_intercepted():
        reading.note("third-party functions intercept every module's calls")
    if returned is not ROWS:
        reading.note("its forward returns something other than one tensor with the input's rows")
    return Shown("", reading.reason)


class _Reading:
    """The reading of a forward and of the functions that it calls."""

    def __init__(self) -> None:
        self.reason = ""

    def note(self, reason: str) -> None:
        """Record why rows are not shown to be independent; the run may still be repeated."""
        self.reason = self.reason or reason

    def call(self, function: Any, arguments: list, depth: int) -> Any:
        """The return value of the function for these arguments."""
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
