"""From a recognised data flow to the fused forward, and from a class to its fused subclass.

The forward is generated from the traced graph with the activation and the multiplication replaced by one call;
everything else in it stays what it was, and child modules are still called as modules. The subclass keeps the name
of the original, so that nothing which looks modules up by class or by name can tell the difference.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import linecache
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from hf_swiglu import functional, reference
from hf_swiglu.patterns import GATINGS
from hf_swiglu.recognition import GatedProduct, Product
from hf_swiglu.recompute import project
from hf_swiglu.reference import Gating


class FusedModule(nn.Module):
    """Mixed into every fused class: copies stay fused, pickles carry the original class.

    A pickle therefore loads on a machine without hf_swiglu, unfused; `patch_model` fuses it again.
    """

    found: Product

    def __setattr__(self, name: str, value: object) -> None:
        # The fused method was made for the old value. The original reads the new one; patching again fuses it anew.
        if name in type(self).found.reads and vars(self).get(name) is not value:
            self.__class__ = original_class(type(self))
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __copy__(self):
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo):
        twin = object.__new__(type(self))
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


_fused_classes: dict[tuple, type[nn.Module]] = {}


def fused_class(
    original: type[nn.Module],
    found: Product,
    recompute: bool = True,
    members: Mapping[str, object] = MappingProxyType({}),
) -> type[nn.Module]:
    """The subclass of `original` whose method computes `found` with one call, and which has these `members` too.

    With `recompute`, a module that takes the product alone keeps it out of the graph: see `recompute.project`.
    """
    if isinstance(found, GatedProduct):
        source, functions = _generate(found, recompute)
        key: tuple = (original, source, *functions.values())
    else:
        source, functions, key = "", {}, (original, found)
    if key not in _fused_classes:
        defined = {
            **members,
            "found": found,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        if source:
            defined[found.method] = _compile(source, functions, original, found.method)
        metaclass = type(original)
        _fused_classes[key] = metaclass(original.__name__, (FusedModule, original), defined)  # type: ignore[misc]
    return _fused_classes[key]


def _generate(found: GatedProduct, recompute: bool) -> tuple[str, dict[str, object]]:
    """The fused method's source, and the names that it uses. The graph that was found is left alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(found.graph, copies))
    product = copies[found.product]
    child = found.activated.child
    with graph.inserting_before(product):
        activation = graph.get_attr(child) if child else None
        if found.packed is not None:
            packed, layout = found.packed
            fused = graph.call_function(packed_function(found.gating, layout), (copies[packed], activation))
        else:
            operands = (copies[found.gate], copies[found.up])
            fused = graph.call_function(separate_function(found.gating), (*operands, activation))
    product.replace_all_uses_with(fused)
    _erase_unused(graph, child)
    if found.packed is None and _solely_owned(copies[found.gate], fused):
        with graph.inserting_before(fused):
            fused.args = (*fused.args, graph.get_attr(found.gate.target))
    if recompute:
        _project(graph, fused)
    code = graph.python_code("self")
    return code.src, dict(code.globals)


def _project(graph: fx.Graph, fused: fx.Node) -> None:
    (user, *others) = fused.users
    if user.op == "call_module" and user.args == (fused,) and not user.kwargs and not others:
        with graph.inserting_before(user):
            down = graph.get_attr(user.target)
            projected = graph.call_function(project, (down, fused))
        user.replace_all_uses_with(projected)
        graph.erase_node(user)


def _erase_unused(graph: fx.Graph, activation_child: str | None) -> None:
    """Take out the nodes that the fused call made superfluous; those of other children stay, hooks and all."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (
            node.op in ("call_function", "call_method", "get_attr")
            or (node.op == "call_module" and node.target == activation_child)
        ):
            graph.erase_node(node)


def _solely_owned(gate: fx.Node, fused: fx.Node) -> bool:
    """Whether a child made gate, and the fused call alone looks at it."""
    return gate.op == "call_module" and list(gate.users) == [fused] and fused.args.count(gate) == 1


def _compile(source: str, functions: dict[str, object], original: type, method: str) -> Callable:
    filename = f"<fused {original.__module__}.{original.__qualname__}.{method} {len(_fused_classes)}>"
    # With the source in linecache, tracebacks and inspect.getsource show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(functions)
    exec(compile(source, filename, "exec"), namespace)
    # The code generator calls every graph `forward`.
    function = namespace["forward"]
    function.__name__ = method
    return function


@functools.cache
def separate_function(gating: Gating) -> Callable:
    """What the generated code calls for gate and up in two tensors; `projection` made gate and nobody else sees it."""

    def gated_product(
        gate: Tensor, up: Tensor, activation: nn.Module | None, projection: nn.Module | None = None
    ) -> Tensor:
        if activation is not None and is_needed(activation, gating.power):
            return reference.product(gate, up, gating, activation)
        if projection is not None and not (gate.requires_grad or up.requires_grad) and _is_fresh(projection):
            return functional.product_into_gate(gate, up, gating)
        return functional.gated_product(gate, up, gating)

    return gated_product


@functools.cache
def packed_function(gating: Gating, layout: str) -> Callable:
    """What the generated code calls for gate and up in one tensor."""

    def packed_product(gate_up: Tensor, activation: nn.Module | None) -> Tensor:
        if activation is not None and is_needed(activation, gating.power):
            gate, up = functional.LAYOUTS[layout](gate_up)
            return reference.product(gate, up, gating, activation)
        return functional.packed_product(gate_up, gating, layout)

    return packed_product


def is_needed(activation: nn.Module, power: int) -> bool:
    """Whether the activation module itself must be called: somebody hooked it, or put another in its place."""
    # Not `type(activation)`: it may be a `WaitingActivation`, which shows the `__class__` of what waits.
    gating = GATINGS.get(activation.__class__)
    return gating is None or gating.power != power or is_watched(activation)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._has_any_global_hook()
        or "forward" in vars(module)
    )


def _is_fresh(projection: nn.Module) -> bool:
    """Whether the projection's output is new memory that nobody else can have kept."""
    return type(projection) is nn.Linear and not is_watched(projection)
