"""From one module to its gated product, or to the reason why there is none.

`torch.fx` traces the module's forward with every child module as a leaf, which turns an MLP into about six nodes.
A SwiGLU is then a pattern, `mul(act(gate), up)`, whatever the children are called and whether or not anybody has
seen the class before. Only graphs whose every node is understood are accepted: a trace bakes Python values in.
"""

from __future__ import annotations

import copy
import dis
import operator
import types
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
_OTHER_FUNCTIONS = {
    F.gelu, F.relu, F.mish, F.hardswish, F.elu, F.leaky_relu, F.selu, F.sigmoid, F.tanh, torch.relu, torch.tanh,
    torch.sigmoid,
}  # fmt: skip
_MODULES = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()} | {SwiGLU}
_NAMES = {function.__name__ for function in _OTHER_FUNCTIONS} | {"silu"}

_MULTIPLY = {operator.mul, torch.mul, "mul"}

# Pure functions of their arguments, kept in the fused forward exactly as they were traced.
_KEPT = {
    *_MULTIPLY, operator.add, operator.sub, operator.truediv, operator.neg, operator.getitem, getattr,
    torch.add, torch.chunk, torch.split, torch.cat, torch.clamp, torch.sigmoid, F.silu, F.dropout, F.linear,
    "add", "chunk", "split", "unbind", "clamp", "view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze",
    "transpose", "permute", "contiguous", "size", "sigmoid", "to", "float", "type_as", "type",
}  # fmt: skip

# What a trace does not see happen: it runs once, and the graph forgets it.
_UNTRACED_OPERATIONS = {"STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "BEFORE_WITH", "LOAD_SPECIAL", "YIELD_VALUE"}


@dataclass(frozen=True)
class GatedProduct:
    """`mul(act(gate), up)` as found in a traced forward. All nodes belong to `graph`."""

    graph: fx.Graph
    product: fx.Node
    activation: fx.Node
    gate: fx.Node
    up: fx.Node
    # The activation's place among the module's children; None where forward calls a function.
    activation_child: str | None
    activation_name: str
    # None for an activation that is not ours: the module is gated, but no SwiGLU.
    gating: Gating | None

    @property
    def packed(self) -> fx.Node | None:
        """The node that holds gate and up side by side, gate first, where there is one."""
        halves = [_half(self.gate), _half(self.up)]
        if halves[0] and halves[1] and halves[0][0] is halves[1][0] and (halves[0][1], halves[1][1]) == (0, 1):
            return halves[0][0]
        return None

    @property
    def kind(self) -> str:
        return "separate" if self.packed is None else "packed"


class NotFusable(Exception):
    """The module looks like a gated MLP and is none that can be fused; the message says why."""


def recognise(module: nn.Module) -> GatedProduct | None:
    """The gated product of `module`'s forward; None where nothing suggests that there is one.

    Raises:
        NotFusable: it looks like a gated MLP but computes something that is not understood.
    """
    if not _could_be_gated(module):
        return None
    suspect = _looks_like_a_gated_mlp(module)
    try:
        graph = trace(module)
    except NotFusable:
        if suspect:
            raise
        return None
    found = [match for node in graph.nodes if (match := _match_product(graph, node, module))]
    if not found:
        if suspect:
            raise NotFusable("it has the projections of a gated MLP, but no activation is multiplied by a projection")
        return None
    if len(found) > 1:
        raise NotFusable(f"it has {len(found)} gated products, expected one")
    if found[0].gating is None and not suspect:
        return None
    _check_understood(graph)
    return found[0]


def trace(module: nn.Module) -> fx.Graph:
    """The data flow of `module`'s forward, with its floats and its `training` flag left symbolic.

    Raises:
        NotFusable: the forward cannot be traced, or does what a trace does not record.
    """
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise NotFusable("its forward is decorated or not a plain function")
    hidden = {instruction.opname for instruction in dis.get_instructions(forward)} & _UNTRACED_OPERATIONS
    if hidden:
        raise NotFusable("its forward assigns attributes, enters a context or yields, which a trace does not record")
    try:
        graph = _Tracer().trace(copy.copy(module))
    except Exception as error:
        # Anything can come out of a forward that was never written to be traced.
        raise NotFusable(f"its forward cannot be traced: {str(error).splitlines()[0] if str(error) else error!r}") from error
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


class _Tracer(fx.Tracer):
    """Children are leaves; plain float attributes and `training` become nodes, so that they are read at run time."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        result = super().create_args_for_root(root_fn, is_module, concrete_args)
        for name, value in list(vars(self.root).items()):
            if name == "training" or type(value) is float:
                vars(self.root)[name] = self.create_proxy("get_attr", name, (), {})
        return result


def _could_be_gated(module: nn.Module) -> bool:
    # A trace costs 10 to 20 ms, and a gate needs at least one projection directly below.
    return any(_is_projection(child) for child in module.children())


def _is_projection(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _looks_like_a_gated_mlp(module: nn.Module) -> bool:
    """Whether there is an activation, and two projections hidden -> I (or one hidden -> 2 I) and one I -> hidden."""
    code = getattr(type(module).forward, "__code__", None)
    if not any(type(child) in _MODULES for child in module.children()) and not (code and _NAMES & set(code.co_names)):
        return False
    shapes = [
        (child.in_features, child.out_features)
        for child in module.children()
        if hasattr(child, "in_features") and hasattr(child, "out_features")
    ]
    for hidden, wide in shapes:
        separate = shapes.count((hidden, wide)) == 2 and (wide, hidden) in shapes
        packed = wide % 2 == 0 and (wide // 2, hidden) in shapes
        if hidden != wide and (separate or packed) and len(shapes) <= 3:
            return True
    return False


def _match_product(graph: fx.Graph, node: fx.Node, module: nn.Module) -> GatedProduct | None:
    if node.op not in ("call_function", "call_method") or node.target not in _MULTIPLY or len(node.args) != 2:
        return None
    for activation, up in (node.args, node.args[::-1]):
        if not isinstance(activation, fx.Node) or not isinstance(up, fx.Node) or len(activation.users) != 1:
            continue
        matched = _match_activation(activation, module)
        if matched is not None and _comes_from_a_projection(activation.args[0]) and _comes_from_a_projection(up):
            child, name, gating = matched
            return GatedProduct(graph, node, activation, activation.args[0], up, child, name, gating)
    return None


def _match_activation(node: fx.Node, module: nn.Module) -> tuple[str | None, str, Gating | None] | None:
    """(child, name, gating) when the node applies an activation function to one tensor."""
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        child = module.get_submodule(node.target)
        if type(child) not in _MODULES and not type(child).__module__ == "torch.nn.modules.activation":
            return None
        return node.target, type(child).__name__, GATINGS.get(type(child))
    if node.op == "call_function" and (node.target in GATINGS or node.target in _OTHER_FUNCTIONS):
        return None, node.target.__name__, GATINGS.get(node.target)
    return None


def _comes_from_a_projection(node: fx.Node) -> bool:
    """Whether a child module made this tensor, directly or through views, casts, norms or scales of its output."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.args:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "call_module"


def _half(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(packed, index) when the node is one of the two halves that `chunk(2, dim=-1)` cuts."""
    if node.op != "call_function" or node.target is not operator.getitem or node.args[1] not in (0, 1):
        return None
    chunks = node.args[0]
    if chunks.op not in ("call_function", "call_method") or chunks.target not in (torch.chunk, "chunk"):
        return None
    count = chunks.args[1] if len(chunks.args) > 1 else chunks.kwargs.get("chunks")
    dim = chunks.args[2] if len(chunks.args) > 2 else chunks.kwargs.get("dim", 0)
    return (chunks.args[0], node.args[1]) if (count, dim) == (2, -1) else None


def _check_understood(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target not in _KEPT | GATINGS.keys() | _OTHER_FUNCTIONS:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise NotFusable(f"its forward also calls {name}, which the patcher does not know")
        if node.target is F.dropout:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if not isinstance(training, fx.Node):
                raise NotFusable("its dropout is switched on or off by something other than the module's training flag")
