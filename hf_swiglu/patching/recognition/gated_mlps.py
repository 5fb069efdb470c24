"""One module's recognition: the products to fuse, their activation's value in this module, or why nothing is fused."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from hf_swiglu.patching.activations import ACTIVATION_CLASSES, OTHER_FUNCTIONS, is_sigmoid, params_of
from hf_swiglu.patching.recognition.gated_products import Chain, Gated
from hf_swiglu.patching.recognition.methods import UNKNOWN, Method, Reading, value_of
from hf_swiglu.patching.recognition.projections import (
    MATRIX_PRODUCTS,
    has_gated_shapes,
    is_of_projections,
    layout_of,
    own_path,
)
from hf_swiglu.reference import SILU, GLUParams


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
    """The result of recognition for a module: products to fuse, or a reason."""

    choices: tuple[Choice, ...]
    # The layout of gate and up: "separate", "packed", "interleaved", or "experts" where experts share the method.
    kind: str
    activation: str
    # The name of the activation among the module's children, if it is one.
    child: str | None
    # None for a gate with another activation, or a module that only resembles a gated MLP.
    params: GLUParams | None
    reason: str = ""
    # The products of a gate with another activation, which no kernel computes: only their memory can be saved.
    memory_only: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class _Activation:
    name: str
    params: GLUParams | None
    child: str | None


def recognise(module: nn.Module, methods: Iterable[Method]) -> Found | None:
    """The gated products in `methods`, those of the module's class; None where nothing indicates one."""
    methods = [method for method in methods if _runs(method, module)]
    choices, first = [], None
    unfusable = []
    for method in methods:
        chosen: list[Reading] = []
        for readings in method.analysis.readings:
            for reading in readings:
                activation = _activation(reading, method, module)
                if activation is None or not is_of_projections(reading, method, module):
                    continue
                if activation.params is None:
                    unfusable.append((reading, method, activation))
                elif not _overlaps(reading, chosen):
                    chosen.append(reading)
                    first = first or (reading, method, activation)
                    break
        if chosen:
            choices.append(Choice(method, tuple(chosen)))
    if first is not None:
        reading, method, activation = first
        kind = layout_of(reading, method, module)
        return Found(tuple(choices), kind, activation.name, activation.child, activation.params)
    for reading, method, activation in unfusable:
        if activation.child is not None or has_gated_shapes(module):
            reason = f"its gate's activation is {activation.name}, not SiLU or SwiGLU"
            return Found(
                (), layout_of(reading, method, module), activation.name, activation.child, None, reason,
                _unfused((method, reading) for reading, method, _ in unfusable),
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
    # An instance attribute shadows the class's method; for `forward`, patching tests that itself.
    return method.name == "forward" or method.name not in vars(module)


def _activation(reading: Reading, method: Method, module: nn.Module) -> _Activation | None:
    """The activation of the reading, if its value in this module is one."""
    if isinstance(reading, Chain) and reading.sigmoid is not None:
        alpha = reading.limits.get("alpha")
        known = alpha.value if isinstance(alpha, ast.Constant) else alpha and value_of(alpha, method, module)
        name = "silu" if alpha is None else f"x * sigmoid({known if known is not UNKNOWN else ast.unparse(alpha)} x)"
        return _Activation(name, SILU, None) if is_sigmoid(value_of(reading.sigmoid, method, module)) else None
    assert reading.activation is not None
    value = value_of(reading.activation, method, module)
    if value is UNKNOWN or not callable(value):
        return None
    child = own_path(reading.activation, method)
    if isinstance(value, nn.Module):
        return _module_activation(value, child)
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)):
        return None
    name = getattr(value, "__name__", str(value))
    if params_of(value) is not None:
        return _Activation(name, params_of(value), None)
    # Any function may be a user-defined activation, except one that multiplies matrices.
    is_stored = child is not None and not hasattr(type(module), child)
    known = value in OTHER_FUNCTIONS or is_stored or (value.__module__ or "").partition(".")[0] not in ("torch", "")
    return (
        _Activation(name, None, None)
        if known and name not in MATRIX_PRODUCTS and not _is_method(value, module)
        else None
    )


def _module_activation(value: nn.Module, child: str | None) -> _Activation | None:
    cls = type(value)
    if params_of(value) is not None:
        return _Activation(cls.__name__, params_of(value), child if child is None or "[" not in child else None)
    if getattr(value, "inplace", False) and params_of(type(value)()) is not None:
        return _Activation(f"{cls.__name__} in place", None, child)
    is_activation = cls in ACTIVATION_CLASSES or cls.__module__ == nn.SiLU.__module__
    # A user-defined one has no weights, unlike norms and projections.
    is_own = not cls.__module__.startswith("torch.nn.") and not any(True for _ in value.parameters())
    return _Activation(cls.__name__, None, child) if is_activation or is_own else None


def _is_method(value: object, module: nn.Module) -> bool:
    return any(value is attribute for cls in type(module).__mro__ for attribute in vars(cls).values())


def _overlaps(reading: Reading, chosen: list[Reading]) -> bool:
    """Whether the chain would replace statements that a chosen one replaces."""
    return isinstance(reading, Chain) and any(
        other.place.block is reading.place.block and other.first <= reading.place.at and reading.first <= other.place.at
        for other in chosen
        if isinstance(other, Chain)
    )


def _suspected(module: nn.Module, methods: list[Method]) -> Found | None:
    """A module that resembles a gated MLP but has no recognised product, with the reason."""
    functions = {function.__name__ for function in OTHER_FUNCTIONS} | {F.silu.__name__}
    activations = [child for child in module.children() if type(child) in ACTIVATION_CLASSES]
    code = getattr(type(module).forward, "__code__", None)
    has_activation = bool(activations) or bool(code and functions & set(code.co_names))
    is_experts = hasattr(type(module), "_apply_gate") and getattr(module, "has_gate", True)
    if not is_experts and not (has_activation and has_gated_shapes(module)):
        return None
    unread = [
        f"its {method.name} cannot be read: {method.analysis.reason}" for method in methods if method.analysis.reason
    ]
    reason = unread[0] if unread else "it has the parts of a gated MLP, but no activation is multiplied by a projection"
    name = type(activations[0]).__name__ if activations else ""
    return Found((), "experts" if is_experts else "separate", name, None, None, reason)
