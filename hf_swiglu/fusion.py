"""From a recognised data flow to the fused forward, and from a class to its fused subclass.

The forward is generated from the traced graph with the activation and the multiplication replaced by one call;
everything else in it stays what it was, and child modules are still called as modules. The subclass keeps the name
of the original, so that nothing which looks modules up by class or by name can tell the difference.
"""

from __future__ import annotations

import copy
import copyreg
import linecache
from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from hf_swiglu import functional
from hf_swiglu.recognition import GATINGS, GatedProduct
from hf_swiglu.reference import Gating


class FusedModule:
    """Mixed into every fused class: copies stay fused, pickles carry the original class.

    A pickle therefore loads on a machine without hf_swiglu, unfused; `patch_model` fuses it again.
    """

    found: GatedProduct

    def __copy__(self):
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol):
        # pickle insists that the usual constructor gets the object's own class; protocol 1's takes any.
        _, _, *state = super().__reduce_ex__(protocol)
        return copyreg._reconstructor, (original_class(type(self)), object, None), *state

    def _get_name(self):
        # Only what `print(model)` shows; the class itself keeps the original's name.
        return f"Fused{type(self).__name__}"


def original_class(fused: type[nn.Module]) -> type[nn.Module]:
    """The class that `fused_class` was given."""
    return fused.__mro__[fused.__mro__.index(FusedModule) + 1]


_fused_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def fused_class(original: type[nn.Module], found: GatedProduct) -> type[nn.Module]:
    """The subclass of `original` whose forward computes `found` with one call."""
    source, namespace = _generate(found)
    # Equal sources differ at most in the functions that they call, which `_product_function` caches.
    key = (original, source + repr(sorted((name, id(value)) for name, value in namespace.items())))
    if key not in _fused_classes:
        forward = _compile(source, namespace, original)
        members = {
            "forward": forward,
            "found": found,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        _fused_classes[key] = type(original)(original.__name__, (FusedModule, original), members)
    return _fused_classes[key]


def _generate(found: GatedProduct) -> tuple[str, dict[str, object]]:
    """The fused forward's source and the names that it uses. The graph that was found is left alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(found.graph, copies)
    graph.output(result)
    product, activation = copies[found.product], copies[found.activation]
    with graph.inserting_before(product):
        child = graph.get_attr(found.activation_child) if found.activation_child else None
        if found.packed is not None:
            operands = (copies[found.packed],)
        else:
            owner = _sole_owner(found)
            projection = graph.get_attr(owner) if owner else None
            operands = (copies[found.gate], copies[found.up], projection)
        function = _product_function(found.gating, found.packed is not None)
        fused = graph.call_function(function, (*operands, child))
    product.replace_all_uses_with(fused)
    graph.erase_node(product)
    graph.erase_node(activation)
    if found.packed is not None:
        _erase_unused(graph, copies[found.gate], copies[found.up])
    code = graph.python_code("self")
    return code.src, dict(code.globals)


def _sole_owner(found: GatedProduct) -> str | None:
    """The child that made gate, when nothing but the activation looks at what it made."""
    if found.gate.op == "call_module" and len(found.gate.users) == 1 and found.gate is not found.up:
        return found.gate.target
    return None


def _erase_unused(graph: fx.Graph, *halves: fx.Node) -> None:
    for half in halves:
        chunks = half.args[0]
        if not half.users:
            graph.erase_node(half)
        if not chunks.users:
            graph.erase_node(chunks)


def _compile(source: str, namespace: dict[str, object], original: type) -> Callable:
    filename = f"<fused {original.__module__}.{original.__qualname__} {id(namespace)}>"
    # With the source in linecache, tracebacks and inspect.getsource show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return namespace["forward"]


_product_functions: dict[tuple[Gating, bool], Callable] = {}


def _product_function(gating: Gating, packed: bool) -> Callable:
    """What the generated forward calls, one function for each member of the family and layout."""
    if (gating, packed) not in _product_functions:
        _product_functions[gating, packed] = _packed(gating) if packed else _separate(gating)
    return _product_functions[gating, packed]


def _separate(gating: Gating) -> Callable:
    def gated_product(gate: Tensor, up: Tensor, projection: nn.Module | None, activation: nn.Module | None) -> Tensor:
        if activation is not None and _is_needed(activation, gating):
            return activation(gate) * up
        if projection is not None and not (gate.requires_grad or up.requires_grad) and _is_fresh(projection):
            return functional.product_into_gate(gate, up, gating)
        return functional.gated_product(gate, up, gating)

    return gated_product


def _packed(gating: Gating) -> Callable:
    def packed_product(gate_up: Tensor, activation: nn.Module | None) -> Tensor:
        if activation is not None and _is_needed(activation, gating):
            gate, up = gate_up.chunk(2, dim=-1)
            return activation(gate) * up
        return functional.packed_product(gate_up, gating)

    return packed_product


def _is_needed(activation: nn.Module, gating: Gating) -> bool:
    """Whether the activation module itself must be called: somebody hooked it, or put another in its place."""
    return _is_watched(activation) or GATINGS.get(type(activation)) is not gating


def _is_watched(module: nn.Module) -> bool:
    """Whether someone hooked the module, and expects it to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_fresh(projection: nn.Module) -> bool:
    """Whether the projection's output is new memory that nobody else can have kept."""
    return (
        type(projection) is nn.Linear
        and not _is_watched(projection)
        and "forward" not in vars(projection)
        and not nn_module._global_forward_hooks
    )
