"""Whether the expressions of gate and up are outputs of projections, followed back in the source, and their layout."""

from __future__ import annotations

import ast

from torch import nn

from hf_swiglu.patching.recognition.gated_products import Chain
from hf_swiglu.patching.recognition.methods import Method, Reading, value_of
from hf_swiglu.patching.recognition.variable_uses import same

# Functions and methods that compute a matrix product.
MATRIX_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"}


def is_of_projections(reading: Reading, method: Method, module: nn.Module) -> bool:
    """Whether gate and up are outputs of projections, or functions of such outputs."""
    parts = reading.operands if isinstance(reading, Chain) else (reading.gate, reading.up)
    return all(_is_projected(part, method, module, frozenset()) for part in parts)


def _is_projected(node: ast.expr, method: Method, module: nn.Module, seen: frozenset[str]) -> bool:
    def again(inner: ast.expr) -> bool:
        return _is_projected(inner, method, module, seen)

    flow = method.analysis.flow
    assert flow is not None
    if isinstance(node, ast.Name):
        if node.id in seen:
            return True
        values = flow.values_of(node.id)
        if node.id in flow.parameters and not values:
            # Helpers, `_apply_gate` among them, receive the outputs of the projections.
            return method.name != "forward"
        return bool(values) and all(_is_projected(value, method, module, seen | {node.id}) for value in values or ())
    if isinstance(node, ast.Call):
        return _is_projection(node, method, module) or any(map(again, _call_inputs(node)))
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult) or again(node.left) or again(node.right)
    if isinstance(node, (ast.Subscript, ast.Attribute, ast.NamedExpr)):
        return again(node.value)
    if isinstance(node, ast.IfExp):
        return again(node.body) and again(node.orelse)
    if isinstance(node, ast.Tuple):
        return bool(node.elts) and all(map(again, node.elts))
    return isinstance(node, ast.UnaryOp) and again(node.operand)


def _is_projection(call: ast.Call, method: Method, module: nn.Module) -> bool:
    if isinstance(call.func, ast.Attribute) and call.func.attr in MATRIX_PRODUCTS:
        return True
    value = value_of(call.func, method, module)
    arguments = [value_of(argument, method, module) for argument in call.args]
    is_child = isinstance(value, nn.Module) or own_path(call.func, method) is not None
    return is_child or any(isinstance(argument, nn.Module) for argument in arguments if argument is not module)


def _call_inputs(call: ast.Call) -> list[ast.expr]:
    """The tensor that a method is called on, or the first argument of a function."""
    return [*([call.func.value] if isinstance(call.func, ast.Attribute) else []), *call.args[:1]]


def layout_of(reading: Reading, method: Method, module: nn.Module) -> str:
    if hasattr(type(module), "_apply_gate"):
        return "experts"
    if isinstance(reading, Chain) and reading.layout is not None:
        return "interleaved" if reading.layout == "interleaved" else "packed"
    parts = reading.operands if isinstance(reading, Chain) else (reading.gate, reading.up)
    sources = [_source(part, method) for part in parts]
    if same(*parts):
        return "separate"
    return "packed" if sources[0] is not None and sources[0] == sources[1] else "separate"


def _source(node: ast.expr, method: Method) -> object:
    """The expression that a name was split from, or that a subscript indexes."""
    flow = method.analysis.flow
    assert flow is not None
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.value)
    values = flow.values_of(node.id) if isinstance(node, ast.Name) else None
    if not values or len(values) > 1:
        return None
    if isinstance(values[0], ast.Tuple):
        cut = {_source(part, method) if isinstance(part, ast.Subscript) else None for part in values[0].elts}
        return cut.pop() if len(cut) == 1 else None
    return values[0]


def has_gated_shapes(module: nn.Module) -> bool:
    """Two projections hidden -> I, or one hidden -> 2 I, and one I -> hidden; attention has more of them."""
    shapes = [
        (child.in_features, child.out_features)
        for child in module.children()
        if hasattr(child, "in_features") and hasattr(child, "out_features")
    ]
    return len(shapes) <= 3 and any(
        hidden != wide
        and (
            (shapes.count((hidden, wide)) == 2 and (wide, hidden) in shapes)
            or (wide % 2 == 0 and (wide // 2, hidden) in shapes)
        )
        for hidden, wide in shapes
    )


def own_path(expression: ast.expr, method: Method) -> str | None:
    """ "act_fn" of `self.act_fn`; None for any other expression."""
    flow = method.analysis.flow
    assert flow is not None
    text = ast.unparse(expression)
    return text.removeprefix(f"{flow.owner}.") if text.startswith(f"{flow.owner}.") else None
