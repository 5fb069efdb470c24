"""The classes of fused modules, and the changes that set or restore the class of a module.

    LlamaMLP  ->  LlamaMLP(FusedModule, rewritten LlamaMLP, LlamaMLP)

The subclass has the original's name, so that code which finds modules by class or by name is not affected. For each
class that has a product, a layer just before it in the method resolution order overrides its methods: `super()` finds
the rewritten version of the method that it found before.
"""

from __future__ import annotations

import copy
import copyreg
import types
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize

from hf_swiglu import _compat
from hf_swiglu.patching.activations import fusable
from hf_swiglu.patching.changes import Change, attribute, entry
from hf_swiglu.patching.memory import checkpointed_forward, recompute, tiled_forward, under_compile
from hf_swiglu.patching.memory.settings import Memory
from hf_swiglu.patching.recognition.gated_mlps import Choice
from hf_swiglu.patching.rewriting import fused_calls
from hf_swiglu.patching.rewriting.rewritten_methods import rewrite


class FusedModule(nn.Module):
    """Mixed into every fused class: copies stay fused, pickles carry the original class.

    A pickle therefore loads on a machine without hf_swiglu, unfused; `patch_model` fuses it again.
    """

    # Of each fused class: the class it was made from, the products rewritten in it, and its memory setting.
    _swiglu_original: type[nn.Module]
    _swiglu_choices: tuple[Choice, ...]
    _swiglu_memory: Memory

    def __init_subclass__(cls, **arguments):
        # The original's own, of a registry for instance, is for subclasses that a user defines.
        pass

    def __copy__(self):
        if hasattr(super(), "__copy__"):
            return super().__copy__()
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo):
        if hasattr(super(), "__deepcopy__"):
            return super().__deepcopy__(memo)
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol):
        # The pickler accepts only the object's own class, so the module has the original class until the pickler
        # iterates over the list items, of which there are none. Loading then needs only the original class.
        function, arguments, *state = super().__reduce_ex__(protocol)
        original = original_class(type(self))
        if function not in (copyreg.__newobj__, copyreg._reconstructor):  # type: ignore[attr-defined]
            # The class defines its own `__reduce__`.
            named = [original if each is type(self) else each for each in (function, *arguments)]
            return named[0], tuple(named[1:]), *state
        restore = _Restore(self)
        if protocol < 2:
            return copyreg._reconstructor, (original, object, None), *state  # type: ignore[attr-defined]
        return copyreg.__newobj__, (original,), state[0], restore  # type: ignore[attr-defined]

    def _get_name(self):
        # Only what `print(model)` shows; the class itself keeps the original's name.
        return f"Fused{type(self).__name__}"


class _Restore:
    """An empty iterator that restores a module's fused class when it is iterated, or when it is deleted."""

    def __init__(self, module: FusedModule):
        self.module, self.fused = module, type(module)
        module.__class__ = original_class(self.fused)

    def __iter__(self):
        return self

    def __next__(self):
        self.module.__class__ = self.fused
        raise StopIteration

    def __del__(self):
        if type(self.module) is original_class(self.fused):
            self.module.__class__ = self.fused


# By original class, memory setting and rewritten products.
_fused_classes: dict[tuple, type[nn.Module]] = {}


def fused_class(original: type[nn.Module], choices: Sequence[Choice], memory: Memory) -> type[nn.Module]:
    """The subclass of `original` in which the chosen products are fused, with the given memory setting.

    Raises:
        NoSource: a method, or its decorator, cannot be rewritten.
    """
    key = (original, memory, *(choice.key for choice in choices))
    if key not in _fused_classes or not _is_unmodified(_fused_classes[key]):
        runtime = _runtime(memory)
        methods: dict[str, object] = {}
        layers: dict[type, dict[str, object]] = {}
        for choice in choices:
            method = choice.method
            # An overridden method is reached by `super()` only.
            is_reached = getattr(original, method.name) is method.function
            owner = original if is_reached else method.owner
            members = methods if is_reached else layers.setdefault(owner, {})
            members[method.name] = rewrite(method, choice.products, runtime, owner, keeps_first=memory.keep == 1)
        if memory.keep < 2:
            methods["forward"] = tiled_forward.outer(methods.get("forward"), original, memory)
        between = [_subclass(owner, (owner,), layers[owner]) for owner in original.__mro__ if owner in layers]
        members = {
            **methods,
            "_swiglu_methods": methods,
            "_swiglu_original": original,
            "_swiglu_choices": tuple(choices),
            "_swiglu_memory": memory,
        }
        _fused_classes[key] = _subclass(original, (FusedModule, original, *between), members)
    return _fused_classes[key]


def _is_unmodified(cls: type[nn.Module]) -> bool:
    """Whether the class still has its rewritten methods: other libraries replace methods of `type(module)`."""
    return all(vars(cls).get(name) is method for name, method in cls._swiglu_methods.items())


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused class was made from, with parametrize's own class around it if there was one."""
    original = vars(cls).get("_swiglu_original")
    if original is not None:
        return original
    parametrized = vars(cls).get("_swiglu_parametrized")
    if parametrized is not None and _members(parametrized) == _members(cls):
        return parametrized
    return _rebased(cls, original_class(cls.__bases__[0]))


def wrapper_of(cls: type[nn.Module]) -> str | None:
    """The name of the class that wraps a fused class, parametrize's excluded; None where there is none."""
    while _is_parametrized(cls):
        cls = cls.__bases__[0]
    if "_swiglu_original" in vars(cls):
        return None
    return next(base.__name__ for base in cls.__mro__[1:] if not issubclass(base, FusedModule))


def is_fused_with(cls: type[FusedModule], choices: Sequence[Choice], memory: Memory) -> bool:
    """Whether a fused class has these products and this memory setting."""
    ours, theirs = ([choice.key for choice in each] for each in (choices, cls._swiglu_choices))
    return ours == theirs and cls._swiglu_memory == memory


def fused_over(cls: type[nn.Module], choices: Sequence[Choice], memory: Memory) -> type[nn.Module]:
    """`fused_class` for the class of a module, which `torch.nn.utils.parametrize` may have created for it.

    Parametrize's class stays outermost, because parametrize removes it from there.
    """
    if not _is_parametrized(cls):
        return fused_class(cls, choices, memory)
    rebased = _rebased(cls, fused_over(cls.__bases__[0], choices, memory))
    rebased._swiglu_parametrized = cls  # type: ignore[attr-defined]
    return rebased


def _is_parametrized(cls: type) -> bool:
    """Whether `parametrize` has created this class for one module."""
    return cls.__name__.startswith("Parametrized") and cls.__module__ == parametrize.__name__


def class_changes(module: nn.Module, cls: type[nn.Module]) -> list[Change]:
    """The changes of the module's class, and of the bound forward that accelerate's hooks keep on the instance."""
    forwards = [entry(vars(module), name, types.MethodType(cls.forward, module)) for name in bound_forwards(module)]
    return [*forwards, attribute(module, "__class__", cls)]


def bound_forwards(module: nn.Module) -> list[str]:
    """The instance attributes that contain the class's own forward: `_old_forward` with accelerate's hook, `forward`
    after its removal."""
    return [
        name
        for name in ("forward", _compat.ACCELERATE_FORWARD)
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]


def _runtime(memory: Memory) -> dict[str, Any]:
    """The functions that rewritten methods call, by their names in rewritten code."""
    project = recompute.project if memory.keep == 2 else recompute.call
    functions = (
        fused_calls.gated,
        fused_calls.times,
        fused_calls.family,
        fused_calls.chained,
        fused_calls.packed,
        fusable,
    )
    return {
        "fused": FusedModule,
        "is_compiling": is_dynamo_compiling,
        "project": checkpointed_forward.project if memory.keep < 2 else project,
        "keep_output": checkpointed_forward.keep_output,
        "call_original": under_compile.caller(memory),
        "call": under_compile.call,
        **{function.__name__: function for function in functions},
    }


def _subclass(like: type, bases: tuple[type, ...], members: dict[str, object]) -> type[nn.Module]:
    named = {name: getattr(like, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(like)(like.__name__, bases, {**members, **named})  # type: ignore[return-value]


def _members(cls: type) -> set[str]:
    """The names that a class of parametrize's defines."""
    return {name for name in vars(cls) if not name.startswith("_swiglu_")}


def _rebased(cls: type, base: type) -> type[nn.Module]:
    members = {name: vars(cls)[name] for name in vars(cls) if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, (base, *cls.__bases__[1:]), members)  # type: ignore[return-value]
