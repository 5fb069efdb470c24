"""Patterns of single expressions: products, limits, offsets, swish written out, a tensor split in two."""

from __future__ import annotations

import ast

from hf_swiglu.patching.recognition.variable_uses import same, target_names

_MULTIPLICATIONS = {"mul", "multiply"}
# Modules whose functions are called, not methods of a tensor.
_NAMESPACES = {"torch", "F", "nn", "functional"}


def factors(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr | None] | None:
    """(first, second, None) of `first * second`, and (first, second, torch.mul) of `torch.mul(first, second)`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return node.left, node.right, None
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 2:
        return None
    is_function = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
    return (*node.args, node.func) if is_function and node.func.attr in _MULTIPLICATIONS else None


def is_plain_call(node: ast.AST) -> bool:
    """`f(x)`: one argument, and nothing else."""
    return (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and not isinstance(node.args[0], ast.Starred)
    )


def upper_limit(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """(x, limit) of `x.clamp(max=limit)`, with or without a `min` that is None."""
    bounds = _clamp(node)
    return (bounds[0], bounds[2]) if bounds and bounds[1] is None and bounds[2] is not None else None


def symmetric_limit(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """(x, limit) of `x.clamp(min=-limit, max=limit)`."""
    bounds = _clamp(node)
    if bounds is None or bounds[1] is None or bounds[2] is None:
        return None
    inner, lowest, highest = bounds
    negated = isinstance(lowest, ast.UnaryOp) and isinstance(lowest.op, ast.USub) and same(lowest.operand, highest)
    return (inner, highest) if negated else None


def offset(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """(x, c) of `x + c` and `c + x`, with a number c."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for inner, constant in ((node.left, node.right), (node.right, node.left)):
            if isinstance(constant, ast.Constant) and type(constant.value) in (int, float):
                return inner, constant
    return None


def written_swish(node: ast.expr) -> tuple[ast.expr, list[ast.expr], ast.expr | None] | None:
    """(torch.sigmoid, every use of g, alpha) of `g * torch.sigmoid(g * alpha)`; alpha is None where it is 1."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    for gate, call in ((node.left, node.right), (node.right, node.left)):
        if not isinstance(gate, ast.Name) or not isinstance(call, ast.Call) or not is_plain_call(call):
            continue
        (inside,) = call.args
        if same(inside, gate):
            return call.func, [gate, inside], None
        if isinstance(inside, ast.BinOp) and isinstance(inside.op, ast.Mult):
            for again, alpha in ((inside.left, inside.right), (inside.right, inside.left)):
                if same(again, gate):
                    return call.func, [gate, again], alpha
    return None


def halves(statement: ast.stmt, gate: str, up: str) -> tuple[ast.expr, str, list[ast.expr]] | None:
    """(packed, layout in `reference`, uses of packed) of a statement that splits a tensor into gate and up."""
    names = target_names(statement)
    if names is None or set(names) != {gate, up} or len(names) != 2:
        return None
    value = statement.value  # type: ignore[attr-defined]
    chunked = _chunked(value)
    if chunked is not None:
        return chunked, "gate_up" if names[0] == gate else "up_gate", [chunked]
    if isinstance(value, ast.Tuple) and len(value.elts) == 2 and names[0] == gate:
        columns = [_strided(part) for part in value.elts]
        if (
            columns[0]
            and columns[1]
            and (columns[0][1], columns[1][1]) == (0, 1)
            and same(columns[0][0], columns[1][0])
        ):
            return columns[0][0], "interleaved", [columns[0][0], columns[1][0]]
    return None


def _clamp(node: ast.expr) -> tuple[ast.expr, ast.expr | None, ast.expr | None] | None:
    """(x, lowest, highest) of a clamp, as a method or as torch's function."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "clamp":
        return None
    is_function = isinstance(node.func.value, ast.Name) and node.func.value.id in _NAMESPACES
    arguments = list(node.args) if is_function else [node.func.value, *node.args]
    given: dict[str | None, ast.expr] = dict(zip(("input", "min", "max"), arguments))
    given |= {keyword.arg: keyword.value for keyword in node.keywords}
    if not given.keys() <= {"input", "min", "max"} or "input" not in given or len(arguments) > 3:
        return None
    bounds = [_unless_none(given.get(name)) for name in ("min", "max")]
    return given["input"], bounds[0], bounds[1]


def _unless_none(node: ast.expr | None) -> ast.expr | None:
    return None if isinstance(node, ast.Constant) and node.value is None else node


def _chunked(node: ast.expr) -> ast.expr | None:
    """x of `x.chunk(2, dim=-1)`, as a method or as torch's function."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "chunk":
        return None
    is_function = isinstance(node.func.value, ast.Name) and node.func.value.id in _NAMESPACES
    arguments = list(node.args) if is_function else [node.func.value, *node.args]
    given: dict[str | None, ast.expr] = dict(zip(("input", "chunks", "dim"), arguments))
    given |= {keyword.arg: keyword.value for keyword in node.keywords}
    if given.keys() != {"input", "chunks", "dim"} or len(arguments) > 3:
        return None
    is_half = ast.unparse(given["chunks"]) == "2" and ast.unparse(given["dim"]) == "-1"
    return given["input"] if is_half else None


def _strided(node: ast.expr) -> tuple[ast.expr, int] | None:
    """(x, start) of `x[..., start::2]`."""
    if not isinstance(node, ast.Subscript):
        return None
    columns = ast.unparse(node.slice).strip("()").replace(" ", "")
    starts = {"...,::2": 0, "...,1::2": 1}
    return (node.value, starts[columns]) if columns in starts else None
