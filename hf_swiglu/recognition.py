"""From one module to its gated product, or to the reason why there is none.

`torch.fx` traces a method of the module with every child as a leaf, which turns an MLP into about six nodes. What is
looked for in them, and whatever the children are called, is in `patterns`. Only graphs whose every node is
understood are accepted: a trace bakes Python values in. Of other methods the source is read: where it multiplies an
activation in the expression that calls it, the two can be fused without knowing what happens around them.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from hf_swiglu.patterns import (
    ACTIVATION_MODULES,
    GATINGS,
    MULTIPLY,
    OTHER_FUNCTIONS,
    Activated,
    attribute_gating,
    match_product,
    part_of,
)
from hf_swiglu.purity import multiplied_attributes, multiplies_a_call, why_a_trace_would_lie
from hf_swiglu.reference import Gating

# Pure functions of their arguments, kept in the fused forward exactly as they were traced.
_KEPT = {
    *MULTIPLY, *GATINGS, *OTHER_FUNCTIONS, operator.add, operator.sub, operator.truediv, operator.floordiv,
    operator.neg, operator.getitem, operator.matmul, getattr, torch.add, torch.chunk, torch.split, torch.cat,
    torch.clamp, torch.bmm, torch.matmul, F.dropout, F.linear, "add", "chunk", "split", "unbind", "clamp", "view",
    "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "size",
    "sigmoid", "to", "float", "type_as", "type", "matmul", "bmm", "t", "expand", "sum",
}  # fmt: skip
_PROJECTIONS = {F.linear, torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"}


@dataclass(frozen=True)
class GatedProduct:
    """`a * (u + offset)` as found in the trace of one method. All nodes belong to `graph`."""

    method: str
    graph: fx.Graph
    product: fx.Node
    activated: Activated
    up: fx.Node
    # None for an activation that is not ours: the module is gated, but no SwiGLU.
    gating: Gating | None
    # The plain attributes that the trace has read, and that the fused method takes for constant.
    reads: frozenset[str]

    @property
    def gate(self) -> fx.Node:
        return self.activated.gate

    @property
    def activation(self) -> str:
        return self.activated.name

    @property
    def child(self) -> str | None:
        return self.activated.child

    @property
    def packed(self) -> tuple[fx.Node, str] | None:
        """The node that holds gate and up side by side, and its layout in `reference.LAYOUTS`."""
        gate, up = part_of(self.gate), part_of(self.up)
        if gate is None or up is None or gate[0] is not up[0]:
            return None
        layouts = {("half 0", "half 1"): "gate_up", ("half 1", "half 0"): "up_gate", ("even", "odd"): "interleaved"}
        layout = layouts.get((gate[1], up[1]))
        return None if layout is None else (gate[0], layout)

    @property
    def kind(self) -> str:
        """How gate and up come: "separate", "packed" or "interleaved"; "experts" where experts share the method."""
        if self.method != "forward":
            return "experts"
        if self.packed is None:
            return "separate"
        return "interleaved" if self.packed[1] == "interleaved" else "packed"


@dataclass(frozen=True)
class UntracedProduct:
    """`self.activation(gate) * up`, written so in a class whose `forward` cannot be traced."""

    attribute: str
    activation: str
    child: str | None
    gating: Gating
    reads: frozenset[str]
    method: str = "forward"
    kind: str = "untraced"


Product = GatedProduct | UntracedProduct


class NotFusable(Exception):
    """The module looks like a gated MLP and is none that can be fused; the message says why."""


def recognise(module: nn.Module, reads: set[str] | None = None) -> Product | None:
    """The gated product in `module`'s own code; None where nothing suggests that there is one.

    transformers' experts compute it in `_apply_gate`, which all their implementations but the eager loop call; in
    every other module it is looked for in `forward`. The names of the attributes that the answer rests on are added
    to `reads`.

    Raises:
        NotFusable: it looks like a gated MLP but computes something that is not understood.
    """
    if not _could_be_gated(module):
        return None
    reads = set() if reads is None else reads
    # Experts without a gate inherit the method and never call it.
    has_gate = hasattr(type(module), "_apply_gate") and getattr(module, "has_gate", True)
    method = "_apply_gate" if has_gate else "forward"
    suspect = method != "forward" or _looks_like_a_gated_mlp(module)
    try:
        return _traced_product(module, method, suspect, reads)
    except NotFusable:
        untraced = _untraced_product(module, reads)
        if untraced is None and suspect:
            raise
        return untraced


def _traced_product(module: nn.Module, method: str, suspect: bool, reads: set[str]) -> GatedProduct | None:
    graph = trace(module, method, reads)
    found = [match for node in graph.nodes if (match := _gated_product(method, graph, node, module, reads)) is not None]
    if not found:
        if suspect:
            raise NotFusable("it has the parts of a gated MLP, but no activation is multiplied by a projection")
        return None
    # `g * sigmoid(alpha * g)` is an activation of ours, and also looks like a sigmoid gate of its own.
    found = [match for match in found if match.gating is not None] or found
    if found[0].gating is None and not suspect:
        return None
    if len(found) > 1:
        raise NotFusable(f"its {method} has {len(found)} gated products, expected one")
    _check_understood(graph)
    return found[0]


def _untraced_product(module: nn.Module, reads: set[str]) -> UntracedProduct | None:
    for name in sorted(multiplied_attributes(type(module))):
        child = name if name in module._modules else None
        value = module._modules[name] if child else vars(module).get(name)
        gating = attribute_gating(value)
        if gating is not None:
            if child is None:
                reads.add(name)
            described = type(value).__name__ if child else getattr(value, "__name__", str(value))
            return UntracedProduct(name, described, child, gating, frozenset(reads))
    return None


def trace(module: nn.Module, method: str, reads: set[str]) -> fx.Graph:
    """The data flow of one method of `module`. The plain attributes that it takes for constant go to `reads`.

    Raises:
        NotFusable: the method cannot be traced, or does what a trace does not record.
    """
    reason = why_a_trace_would_lie(type(module), method)
    if reason is not None:
        raise NotFusable(f"its {reason}")
    try:
        graph = _Tracer(method).trace(_recording_twin(module, reads))
    except Exception as error:
        # Anything can come out of code that was never written to be traced.
        message = str(error).splitlines()[0] if str(error) else repr(error)
        raise NotFusable(f"its {method} cannot be traced: {message}") from error
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr" and not hasattr(module, node.target):
            raise NotFusable(f"its {method} makes a tensor of its own, which a trace would make only once")
    return graph


def _recording_twin(module: nn.Module, reads: set[str]) -> nn.Module:
    """A shallow copy that notes which of its plain attributes are read."""

    def __getattribute__(self, name: str):
        if name in attributes:
            reads.add(name)
        return cls.__getattribute__(self, name)

    cls = type(module)
    metaclass = type(cls)
    twin = object.__new__(metaclass(cls.__name__, (cls,), {"__getattribute__": __getattribute__}))  # type: ignore[misc]
    # What nn.Module keeps for itself, children and parameters among it, is not for a forward to read.
    attributes = vars(module).keys() - vars(nn.Module()).keys()
    vars(twin).update(vars(module))
    return twin


class _Tracer(fx.Tracer):
    """Children are leaves; parameters, buffers and `training` become nodes, so that they are read at run time."""

    proxy_buffer_attributes = True

    def __init__(self, method: str):
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        result = super().create_args_for_root(root_fn, is_module, concrete_args)
        vars(self.root)["training"] = self.create_proxy("get_attr", "training", (), {})
        return result


def _could_be_gated(module: nn.Module) -> bool:
    # A trace costs 10 to 20 ms, and a gate needs a projection, a child or a weight of the module's own. Experts of an
    # unknown kind are told by their activation.
    return (
        any(_is_projection(child) or type(child) in ACTIVATION_MODULES for child in module.children())
        or any(parameter.dim() >= 2 for parameter in module._parameters.values() if parameter is not None)
        or any(attribute_gating(value) for value in vars(module).values() if inspect.isroutine(value))
    )


def _is_projection(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _looks_like_a_gated_mlp(module: nn.Module) -> bool:
    """Whether the module deserves a reason when it is not fused: by its source, or by its projections."""
    children = [name for name, child in module.named_children() if type(child) in ACTIVATION_MODULES]
    if multiplies_a_call(type(module), "forward", {f"self.{name}" for name in children}):
        return True
    code = getattr(type(module).forward, "__code__", None)
    functions = {function.__name__ for function in OTHER_FUNCTIONS} | {"silu"}
    if not children and not (code and functions & set(code.co_names)):
        return False
    shapes = [
        (child.in_features, child.out_features)
        for child in module.children()
        if hasattr(child, "in_features") and hasattr(child, "out_features")
    ]
    # Two projections hidden -> I, or one hidden -> 2 I, and one I -> hidden; attention has more of them.
    return len(shapes) <= 3 and any(
        hidden != wide
        and (
            (shapes.count((hidden, wide)) == 2 and (wide, hidden) in shapes)
            or (wide % 2 == 0 and (wide // 2, hidden) in shapes)
        )
        for hidden, wide in shapes
    )


def _gated_product(
    method: str, graph: fx.Graph, node: fx.Node, module: nn.Module, reads: set[str]
) -> GatedProduct | None:
    matched = match_product(node, module)
    if matched is None:
        return None
    activated, up, gating = matched
    # `_apply_gate` is handed what the projections made.
    if method == "forward" and not (_comes_from_a_projection(activated.gate) and _comes_from_a_projection(up)):
        return None
    return GatedProduct(method, graph, node, activated, up, gating, frozenset(reads))


def _comes_from_a_projection(node: object) -> bool:
    """Whether a child module or a matrix product made this tensor, directly or through functions of its output."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.args:
        if node.target in _PROJECTIONS:
            return True
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "call_module"


def _check_understood(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target not in _KEPT:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise NotFusable(f"it also calls {name}, which the patcher does not know")
        if node.target is F.dropout:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if not isinstance(training, fx.Node):
                raise NotFusable("its dropout is switched on or off by something other than the module's training flag")
