"""The algebra of a gated product: which nodes of a traced forward are `a * (u + offset)` of `reference.Gating`.

    mul(act(gate), up)                                              LLaMA, with either order of the factors
    mul(mul(g, sigmoid(mul(g, alpha))), add(clamp(up), 1))          GPT-OSS, with g = clamp(gate, max)
    mul(clamp(act(gate), max), clamp(up, -limit, limit))            Step-3.7

A limit is recognised where PyTorch's clamp stands for it; anything else around gate and up stays in the forward.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers.activations import ACT2CLS, SiLUActivation

from hf_swiglu.activation import SwiGLU
from hf_swiglu.reference import SILU, SWIGLU, Gating

# Activations whose product with `up` is one of ours.
GATINGS: dict[object, Gating] = {nn.SiLU: SILU, SiLUActivation: SILU, F.silu: SILU, SwiGLU: SWIGLU}

# Activations that make a gated MLP of another kind: GLU, GeGLU, ReGLU and friends.
OTHER_FUNCTIONS = {
    F.gelu, F.relu, F.mish, F.hardswish, F.elu, F.leaky_relu, F.selu, F.sigmoid, F.tanh, torch.relu, torch.tanh,
    torch.sigmoid,
}  # fmt: skip
ACTIVATION_MODULES = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()} | {SwiGLU}

MULTIPLY = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}
_CLAMP = {torch.clamp, "clamp"}
_SIGMOID = {torch.sigmoid, F.sigmoid, "sigmoid"}


@dataclass(frozen=True)
class Activated:
    """An activation of the gate. `gating` is None for one that is not ours."""

    gate: fx.Node
    name: str
    gating: Gating | None
    child: str | None = None


def match_product(node: fx.Node, module: nn.Module) -> tuple[Activated, fx.Node, Gating | None] | None:
    """(activated gate, up, gating) when the node multiplies the two."""
    if not calls(node, MULTIPLY) or len(node.args) != 2:
        return None
    for first, second in (node.args, node.args[::-1]):
        activated = _match_activated(first, module)
        if activated is None or not isinstance(second, fx.Node) or second is activated.gate:
            continue
        up, limit, offset = _match_up(second)
        if activated.gating is None:
            return activated, second, None
        return activated, up, activated.gating._replace(up_limit=limit, up_offset=offset)
    return None


def attribute_gating(value: object) -> Gating | None:
    """The member of the family that an attribute, a module or a function, multiplies by; None for any other."""
    if isinstance(value, nn.Module):
        # In place it would change what others see of the gate.
        return None if getattr(value, "inplace", False) else GATINGS.get(type(value))
    return GATINGS.get(value) if callable(value) else None


def calls(node: object, targets: set) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def part_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """(packed, which) when the node is a half that `chunk(2, dim=-1)` cuts, or the even or odd columns."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    source, index = node.args
    if isinstance(index, tuple):
        columns = [(..., slice(None, None, 2)), (..., slice(1, None, 2))]
        return (source, ("even", "odd")[columns.index(index)]) if index in columns else None
    if index not in (0, 1) or not calls(source, {torch.chunk, "chunk"}):
        return None
    given = dict(zip(("input", "chunks", "dim"), source.args)) | source.kwargs
    return (source.args[0], f"half {index}") if (given.get("chunks"), given.get("dim")) == (2, -1) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _match_activated(node: object, module: nn.Module) -> Activated | None:
    bounds = _clamp_bounds(node)
    if bounds is not None and bounds[0] == -math.inf:
        inner = _match_activation(node.args[0], module)
        if inner is not None and inner.gating is not None:
            return Activated(inner.gate, inner.name, inner.gating._replace(act_limit=bounds[1]), inner.child)
    return _match_activation(node, module)


def _match_activation(node: object, module: nn.Module) -> Activated | None:
    """An activation module, an activation function, or `g * sigmoid(alpha * g)` written out."""
    if not isinstance(node, fx.Node):
        return None
    for gate, alpha in _match_swish(node):
        name = "silu" if alpha == 1 else f"x * sigmoid({alpha} x)"
        return _limited_gate(gate, name, Gating(alpha=alpha), None)
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or node.kwargs.get("inplace"):
        return None
    if node.op == "call_module":
        child = module.get_submodule(node.target)
        kind = type(child)
        # Who else looks at gate would miss that an activation in place has changed it.
        if getattr(child, "inplace", False) and len(node.args[0].users) > 1:
            return None
        if kind in ACTIVATION_MODULES or kind.__module__ == nn.SiLU.__module__:
            return _limited_gate(node.args[0], kind.__name__, GATINGS.get(kind), node.target)
    elif node.op == "call_function" and (node.target in GATINGS or node.target in OTHER_FUNCTIONS):
        return _limited_gate(node.args[0], node.target.__name__, GATINGS.get(node.target), None)
    elif calls(node, {"sigmoid", "relu", "tanh"}):
        return _limited_gate(node.args[0], node.target, None, None)
    return None


def _match_swish(node: fx.Node) -> Iterator[tuple[fx.Node, float]]:
    if not calls(node, MULTIPLY) or len(node.args) != 2:
        return
    for gate, sigmoid in (node.args, node.args[::-1]):
        if not isinstance(gate, fx.Node) or not calls(sigmoid, _SIGMOID):
            continue
        inside = sigmoid.args[0]
        if inside is gate:
            yield gate, 1.0
        elif calls(inside, MULTIPLY) and gate in inside.args:
            alpha = _number(inside.args[1 - inside.args.index(gate)])
            if alpha is not None:
                yield gate, alpha


def _limited_gate(gate: fx.Node, name: str, gating: Gating | None, child: str | None) -> Activated:
    bounds = _clamp_bounds(gate)
    if gating is not None and bounds is not None and bounds[0] == -math.inf:
        return Activated(gate.args[0], name, gating._replace(gate_limit=bounds[1]), child)
    return Activated(gate, name, gating, child)


def _match_up(node: fx.Node) -> tuple[fx.Node, float, float]:
    """(up, limit, offset), with the limit and the offset that were taken off."""
    limit, offset = math.inf, 0.0
    if calls(node, _ADD) and len(node.args) == 2 and isinstance(node.args[0], fx.Node) and not node.kwargs:
        constant = _number(node.args[1])
        if constant is not None:
            node, offset = node.args[0], constant
    bounds = _clamp_bounds(node)
    if bounds is not None and bounds[0] == -bounds[1] and bounds[1] != math.inf:
        node, limit = node.args[0], bounds[1]
    return node, limit, offset


def _clamp_bounds(node: object) -> tuple[float, float] | None:
    """(lowest, highest) of a clamp between numbers."""
    if not calls(node, _CLAMP):
        return None
    given = dict(zip(("input", "min", "max"), node.args)) | node.kwargs
    bounds = []
    for name, unbounded in (("min", -math.inf), ("max", math.inf)):
        value = given.get(name)
        bounds.append(unbounded if value is None else _number(value))
    return None if None in bounds else (bounds[0], bounds[1])
