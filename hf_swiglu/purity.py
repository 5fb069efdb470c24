"""What a trace does not see, found in a method's source before it is trusted.

A trace runs the Python once and keeps the tensor operations. It cannot know that a branch could have gone the other
way, that an attribute was stored, or that a context was entered; a method that does any of that is refused.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Iterator

from torch import nn

_MODES = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_compiling", "is_tracing"}
_BUILTINS = {"isinstance", "hasattr", "getattr", "len", "int", "float", "bool", "str", "type"}


def why_a_trace_would_lie(cls: type[nn.Module], method: str) -> str | None:
    """What `method` of `cls`, or a helper that it calls, does behind a trace's back; None when there is nothing."""
    for function in _reachable(cls, method):
        if hasattr(function, "__wrapped__"):
            return f"{function.__name__} is decorated"
        reason = _why_impure(function)
        if reason is not None:
            return f"{function.__name__} {reason}, which a trace does not record"
    return None


def _reachable(cls: type, method: str) -> Iterator[types.FunctionType]:
    """The method, and the plain Python functions outside torch that it names, directly or through others."""
    pending, seen = [getattr(cls, method)], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, types.FunctionType) or function in seen or function.__module__.startswith("torch"):
            continue
        seen.add(function)
        yield function
        for name in function.__code__.co_names:
            pending += [getattr(cls, name, None), function.__globals__.get(name)]


def multiplies_a_call(cls: type[nn.Module], method: str, functions: set[str]) -> bool:
    """Whether the source multiplies what one of `functions` returns, such as "self.act_fn", in one expression."""
    tree = _source_tree(getattr(cls, method)) if functions else None
    return tree is not None and any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and any(isinstance(side, ast.Call) and ast.unparse(side.func) in functions for side in (node.left, node.right))
        for node in ast.walk(tree)
    )


@functools.cache
def multiplied_attributes(cls: type) -> frozenset[str]:
    """The attributes that `cls` multiplies by something else wherever it reads them, as in `self.act_fn(gate) * up`."""
    reads: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if name == "__init__" or not isinstance(function, types.FunctionType):
                continue
            tree = _source_tree(inspect.unwrap(function))
            if tree is None:
                return frozenset()
            for node in ast.walk(tree):
                reads[_own_attribute(node)] += 1
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                    for side in (node.left, node.right):
                        products[_own_attribute(getattr(side, "func", None))] += 1
    return frozenset(name for name, count in products.items() if name and count == reads[name])


def _own_attribute(node: ast.AST | None) -> str:
    """What `self.name` reads: "name"; "" for anything else."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return ""
    return node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else ""


@functools.cache
def _source_tree(function: types.FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _why_impure(function: types.FunctionType) -> str | None:
    tree = _source_tree(function)
    if tree is None:
        # Without its source a method may still be traced, if its bytecode goes straight from top to bottom.
        jumps = any("JUMP_IF" in instruction.opname for instruction in dis.get_instructions(function))
        return "branches, and its source is not available" if jumps else None
    for node in ast.walk(tree):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            return "enters a context"
        if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal, ast.Delete, ast.Try)):
            return f"has a {type(node).__name__.lower()}"
        if isinstance(node, ast.AugAssign):
            # On a tensor that writes in place; fx knows no such operation and records a new tensor instead.
            return f"updates {ast.unparse(node.target)} in place"
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            return f"calls {ast.unparse(node)} for its effect"
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            return f"assigns {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr == "training" and ast.unparse(node) != "self.training":
            return f"reads {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr in _MODES:
            return f"asks {ast.unparse(node)}"
        test = getattr(node, "test", None)
        if test is not None and not _is_fixed(test):
            return f"branches on {ast.unparse(test)}"
    return None


def _is_fixed(test: ast.expr) -> bool:
    """Whether a condition reads the module's own attributes only, which are the same at every call."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return names <= {"self", *_BUILTINS}
