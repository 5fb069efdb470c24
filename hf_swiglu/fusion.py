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

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from hf_swiglu import functional, reference
from hf_swiglu.patterns import GATINGS
from hf_swiglu.recognition import GatedProduct, Product
from hf_swiglu.recompute import child_of, project
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


class _Self:
    """`self` as an argument in generated code: a child is looked up where it is needed, in a tenth of the microsecond
    that `nn.Module.__getattr__` takes."""

    def __repr__(self):
        return "self"


def _generate(found: GatedProduct, recompute: bool) -> tuple[str, dict[str, object]]:
    """The fused method's source, and the names that it uses. The graph that was found is left alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(found.graph, copies))
    product = copies[found.product]
    if found.packed is None:
        function, operands = separate_function(found.gating), (copies[found.gate], copies[found.up])
    else:
        function, operands = packed_function(found.gating, found.packed[1]), (copies[found.packed[0]],)
    with graph.inserting_before(product):
        fused = graph.call_function(function, (*operands, _Self(), found.child))  # type: ignore[arg-type]
    product.replace_all_uses_with(fused)
    _erase_unused(graph, found.child)
    down = _only_projection(fused)
    if _solely_owned(operands[0], fused) and (found.packed is None or down is not None):
        fused.args += (operands[0].target,) if found.packed is None else (operands[0].target, down.target)
    if recompute and down is not None:
        with graph.inserting_before(down):
            projected = graph.call_function(project, (_Self(), down.target, fused))  # type: ignore[arg-type]
        down.replace_all_uses_with(projected)
        graph.erase_node(down)
    code = graph.python_code("self")
    return code.src, dict(code.globals)


def _only_projection(fused: fx.Node) -> fx.Node | None:
    """The child that takes the product, alone and as it is."""
    (user, *others) = fused.users
    alone = user.op == "call_module" and user.args == (fused,) and not user.kwargs and not others
    return user if alone else None


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
        gate: Tensor, up: Tensor, module: nn.Module, activation: str | None, projection: str | None = None
    ) -> Tensor:
        if activation is not None:
            called = child_of(module, activation)
            if _is_needed(called, gating.power):
                return reference.product(gate, up, gating, called)
        if projection is not None and _owns(module, projection, gate, up):
            return functional.product_into_gate(gate, up, gating)
        return functional.gated_product(gate, up, gating)

    return gated_product


@functools.cache
def packed_function(gating: Gating, layout: str) -> Callable:
    """What the generated code calls for gate and up in one tensor; `projection` made it, `down` takes the product."""

    def packed_product(
        gate_up: Tensor, module: nn.Module, activation: str | None, projection: str | None = None, down: str = ""
    ) -> Tensor:
        if activation is not None:
            called = child_of(module, activation)
            if _is_needed(called, gating.power):
                gate, up = reference.LAYOUTS[layout](gate_up)
                return reference.product(gate, up, gating, called)
        if projection is not None and _owns(module, projection, gate_up) and _takes_rows(child_of(module, down)):
            gate, up = reference.LAYOUTS[layout](gate_up)
            return functional.product_into_gate(gate, up, gating)
        return functional.packed_product(gate_up, gating, layout)

    return packed_product


def _owns(module: nn.Module, projection: str, *tensors: Tensor) -> bool:
    """Whether the module owns what its child made, and no gradient will ask for it."""
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) and _is_fresh(
        child_of(module, projection)
    )


def _is_needed(activation: nn.Module, power: int) -> bool:
    """Whether the activation module itself must be called: somebody hooked it, or put another in its place."""
    gating = GATINGS.get(type(activation))
    return gating is None or gating.power != power or is_watched(activation)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks, or a forward of its own."""
    state = vars(module)
    if "forward" in state or nn_module._has_any_global_hook():
        return True
    # Not as a list: this runs for every token, and a list of them took 1 us more of an MLP's 24 (EPYC 9004).
    forward, before = state["_forward_hooks"], state["_forward_pre_hooks"]
    backward, before_backward = state["_backward_hooks"], state["_backward_pre_hooks"]
    if not (forward or before or backward or before_backward):
        return False
    return bool(module._parameters) or not all(map(_only_gather, (forward, before, backward, before_backward)))


def _only_gather(hooks: Mapping[int, Callable]) -> bool:
    # DeepSpeed's ZeRO-3 hooks every module, to gather the parameters that it has; an activation has none.
    return all((getattr(hook, "__module__", None) or "").startswith("deepspeed.") for hook in hooks.values())


def _is_fresh(projection: nn.Module) -> bool:
    """Whether the projection's output is new memory that nobody else can have kept."""
    return type(projection) is nn.Linear and not is_watched(projection)


def _takes_rows(down: nn.Module) -> bool:
    """Whether the projection reads rows that lie apart where they are; with a bias it would copy them."""
    return type(down) is nn.Linear and down.bias is None and not is_watched(down)
