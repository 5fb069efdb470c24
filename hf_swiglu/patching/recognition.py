"""From one module to the gated products in its methods, or to the reason why it has none that can be fused."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from hf_swiglu.patching.activations import ACTIVATION_CLASSES, OTHER_FUNCTIONS, is_sigmoid, params_of
from hf_swiglu.patching.flow import same
from hf_swiglu.patching.matching import Chain, Gated
from hf_swiglu.patching.methods import UNKNOWN, Method, value_of
from hf_swiglu.reference import SILU, GLUParams

Reading = Gated | Chain

# Functions and methods that make another tensor by a matrix product.
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"}


@dataclass(frozen=True)
class Choice:
    """The products of one method that are to be rewritten."""

    method: Method
    products: tuple[Reading, ...]

    @property
    def key(self) -> tuple:
        """Equal for choices that are rewritten alike."""
        method = self.method
        return method.owner, method.name, method.function, tuple(id(product.node) for product in self.products)


@dataclass(frozen=True)
class Found:
    """What became of a module: products to fuse, or a reason."""

    choices: tuple[Choice, ...]
    # How gate and up come: "separate", "packed", "interleaved", or "experts" where experts share the method.
    kind: str
    activation: str
    # The name of the activation among the module's children, if it is one.
    child: str | None
    # None for a gate that is activated by something else, or a module that only looks like a gated MLP.
    params: GLUParams | None
    reason: str = ""
    # The products of a gate with another activation, which no kernel computes: only their memory can be saved.
    others: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class _Activation:
    name: str
    params: GLUParams | None
    child: str | None


def recognise(module: nn.Module, methods: Iterable[Method]) -> Found | None:
    """The gated products in `methods`, those of the module's class; None where nothing suggests that there is one."""
    methods = [method for method in methods if _runs(method, module)]
    choices, first = [], None
    others = []
    for method in methods:
        chosen: list[Reading] = []
        for readings in method.analysis.readings:
            for reading in readings:
                activation = _activation(reading, method, module)
                if activation is None or not _is_of_projections(reading, method, module):
                    continue
                if activation.params is None:
                    others.append((reading, method, activation))
                elif not _overlaps(reading, chosen):
                    chosen.append(reading)
                    first = first or (reading, method, activation)
                    break
        if chosen:
            choices.append(Choice(method, tuple(chosen)))
    if first is not None:
        reading, method, activation = first
        kind = _kind(reading, method, module)
        return Found(tuple(choices), kind, activation.name, activation.child, activation.params)
    for reading, method, activation in others:
        if activation.child is not None or _has_gated_shapes(module):
            reason = f"its gate's activation is {activation.name}, not SiLU or SwiGLU"
            return Found(
                (), _kind(reading, method, module), activation.name, activation.child, None, reason,
                _unfused((method, reading) for reading, method, _ in others),
            )  # fmt: skip
    return _suspected(module, methods)


def _unfused(readings: Iterable[tuple[Method, Reading]]) -> tuple[Choice, ...]:
    """The single expressions among them, method by method."""
    chosen: dict[int, tuple[Method, list[Gated]]] = {}
    for method, reading in readings:
        products = chosen.setdefault(id(method), (method, []))[1]
        if isinstance(reading, Gated) and not any(reading.node is other.node for other in products):
            products.append(reading)
    return tuple(Choice(method, tuple(products)) for method, products in chosen.values() if products)


def _runs(method: Method, module: nn.Module) -> bool:
    if method.name == "_apply_gate" and not getattr(module, "has_gate", True):
        # Experts without a gate inherit the method and never call it.
        return False
    # An attribute of the instance hides the class's method; of `forward` patching sees that for itself.
    return method.name == "forward" or method.name not in vars(module)


def _activation(reading: Reading, method: Method, module: nn.Module) -> _Activation | None:
    """What the reading takes for the activation, if it is one in this module."""
    if isinstance(reading, Chain) and reading.sigmoid is not None:
        alpha = reading.limits.get("alpha")
        known = alpha.value if isinstance(alpha, ast.Constant) else alpha and value_of(alpha, method, module)
        name = "silu" if alpha is None else f"x * sigmoid({known if known is not UNKNOWN else ast.unparse(alpha)} x)"
        return _Activation(name, SILU, None) if is_sigmoid(value_of(reading.sigmoid, method, module)) else None
    assert reading.activation is not None
    value = value_of(reading.activation, method, module)
    if value is UNKNOWN or not callable(value):
        return None
    child = _own_path(reading.activation, method)
    if isinstance(value, nn.Module):
        return _module_activation(value, child)
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)):
        return None
    name = getattr(value, "__name__", str(value))
    if params_of(value) is not None:
        return _Activation(name, params_of(value), None)
    # Any function may be an activation of the user's own; one that multiplies matrices is none.
    is_stored = child is not None and not hasattr(type(module), child)
    known = value in OTHER_FUNCTIONS or is_stored or (value.__module__ or "").partition(".")[0] not in ("torch", "")
    return _Activation(name, None, None) if known and name not in _PRODUCTS and not _is_method(value, module) else None


def _module_activation(value: nn.Module, child: str | None) -> _Activation | None:
    cls = type(value)
    if params_of(value) is not None:
        return _Activation(cls.__name__, params_of(value), child if child is None or "[" not in child else None)
    if getattr(value, "inplace", False) and params_of(type(value)()) is not None:
        return _Activation(f"{cls.__name__} in place", None, child)
    is_activation = cls in ACTIVATION_CLASSES or cls.__module__ == nn.SiLU.__module__
    # One of the user's own has no weights, as norms and projections have.
    is_own = not cls.__module__.startswith("torch.nn.") and not any(True for _ in value.parameters())
    return _Activation(cls.__name__, None, child) if is_activation or is_own else None


def _is_method(value: object, module: nn.Module) -> bool:
    return any(value is attribute for cls in type(module).__mro__ for attribute in vars(cls).values())


def _own_path(expression: ast.expr, method: Method) -> str | None:
    """ "act_fn" of `self.act_fn`; None for what is not an attribute of the module."""
    flow = method.analysis.flow
    assert flow is not None
    text = ast.unparse(expression)
    return text.removeprefix(f"{flow.owner}.") if text.startswith(f"{flow.owner}.") else None


def _overlaps(reading: Reading, chosen: list[Reading]) -> bool:
    """Whether two chains would make the same statements superfluous."""
    return isinstance(reading, Chain) and any(
        other.place.block is reading.place.block and other.first <= reading.place.at and reading.first <= other.place.at
        for other in chosen
        if isinstance(other, Chain)
    )


def _is_of_projections(reading: Reading, method: Method, module: nn.Module) -> bool:
    """Whether gate and up are what projections made, directly or through functions of their output."""
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
            # Helpers, `_apply_gate` among them, are handed what the projections made.
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
    if isinstance(call.func, ast.Attribute) and call.func.attr in _PRODUCTS:
        return True
    value = value_of(call.func, method, module)
    handed = [value_of(argument, method, module) for argument in call.args]
    is_child = isinstance(value, nn.Module) or _own_path(call.func, method) is not None
    return is_child or any(isinstance(argument, nn.Module) for argument in handed if argument is not module)


def _call_inputs(call: ast.Call) -> list[ast.expr]:
    """The tensor that a method is called on, or the first argument of a function."""
    return [*([call.func.value] if isinstance(call.func, ast.Attribute) else []), *call.args[:1]]


def _kind(reading: Reading, method: Method, module: nn.Module) -> str:
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
    """The expression that a name was cut from, or the name of what an element is taken from."""
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


def _suspected(module: nn.Module, methods: list[Method]) -> Found | None:
    """A module that looks like a gated MLP and has no product that was understood, with the reason."""
    functions = {function.__name__ for function in OTHER_FUNCTIONS} | {F.silu.__name__}
    activations = [child for child in module.children() if type(child) in ACTIVATION_CLASSES]
    code = getattr(type(module).forward, "__code__", None)
    has_activation = bool(activations) or bool(code and functions & set(code.co_names))
    is_experts = hasattr(type(module), "_apply_gate") and getattr(module, "has_gate", True)
    if not is_experts and not (has_activation and _has_gated_shapes(module)):
        return None
    unread = [
        f"its {method.name} cannot be read: {method.analysis.reason}" for method in methods if method.analysis.reason
    ]
    reason = unread[0] if unread else "it has the parts of a gated MLP, but no activation is multiplied by a projection"
    name = type(activations[0]).__name__ if activations else ""
    return Found((), "experts" if is_experts else "separate", name, None, None, reason)


def _has_gated_shapes(module: nn.Module) -> bool:
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
