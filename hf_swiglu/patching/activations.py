"""Which modules and functions are SiLU or SwiGLU, and whether a call of one, times up, may be fused at this moment."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS, SiLUActivation

from hf_swiglu import _compat
from hf_swiglu.activation import SwiGLU
from hf_swiglu.reference import SILU, SWIGLU, GLUParams

_silu = F.silu
_SIGMOIDS = (torch.sigmoid, F.sigmoid)
_MULTIPLICATIONS = (torch.mul, torch.multiply)

# The member of the family that a module of each class computes.
ACTIVATION_PARAMS: dict[type, GLUParams] = {nn.SiLU: SILU, SiLUActivation: SILU, SwiGLU: SWIGLU}
# The original forwards; a class whose forward was replaced before this import is left out.
_FORWARDS: dict[type, Callable[..., Any]] = {
    cls: cls.forward
    for cls in ACTIVATION_PARAMS
    if cls.forward.__globals__["__name__"] == cls.__module__ and _compat.knows_hooks
}
_is_silu_original = getattr(_silu, "__globals__", {}).get("__name__") == "torch.nn.functional"

# Activations of other gated MLPs: GLU, GeGLU, ReGLU and so on.
OTHER_FUNCTIONS = {
    F.gelu, F.relu, F.mish, F.hardswish, F.elu, F.leaky_relu, F.selu, F.sigmoid, F.tanh, F.logsigmoid, torch.relu,
    torch.tanh, torch.sigmoid,
}  # fmt: skip
ACTIVATION_CLASSES = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()} | {SwiGLU}


def fusable(activation: object, multiply: object = torch.mul) -> GLUParams | None:
    """The member of the family that a call of `activation`, in its present state, computes.

    None for every other callable, and for one that has hooks, another forward on the instance or on its class, or that
    works in place. `multiply` is the function that multiplies, where it is not the operator `*`.
    """
    cls = type(activation)
    params = ACTIVATION_PARAMS.get(cls)
    if params is None:
        is_silu = activation is _silu and _is_silu_original and multiply in _MULTIPLICATIONS
        return SILU if is_silu else None
    state = activation.__dict__
    if (
        cls.forward is not _FORWARDS.get(cls)  # type: ignore[attr-defined]
        or cls.__call__ is not _compat.module_call  # type: ignore[operator]
        or F.silu is not _silu
        or "forward" in state
        or state.get("inplace")
        or multiply not in _MULTIPLICATIONS
        or _compat.has_global_hook()
    ):
        return None
    # Tested inline first: this runs for every token, and a call takes 0.1 us of an MLP's 25.
    has_hooks = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    return None if has_hooks and not has_no_hooks(state, _only_gathers) else params


def is_sigmoid(function: object) -> bool:
    """Whether `function` is PyTorch's sigmoid."""
    return function in _SIGMOIDS


def params_of(activation: object) -> GLUParams | None:
    """The result of `fusable` for an activation without hooks and replaced functions."""
    if activation is _silu:
        return SILU
    return None if getattr(activation, "inplace", False) else ACTIVATION_PARAMS.get(type(activation))


def has_no_hooks(state: Mapping[str, Any], allowed: Callable[[Callable], bool]) -> bool:
    """Whether every hook of the module with this `__dict__` is allowed."""
    return all(allowed(hook) for kind in _compat.HOOKS for hook in state[kind].values())


def _only_gathers(hook: Callable) -> bool:
    # DeepSpeed's ZeRO-3 registers hooks on every module to gather its parameters; an activation has none.
    return defining_module(hook).startswith("deepspeed.")


def defining_module(code: Any) -> str:
    """The module, with a dot at the end, that defines a function, a class or the class of a callable object.

    `functools.wraps` copies `__module__` to functions and objects from other modules; `functools.partial` and
    `torch.compiler.disable` wrap a function without being its code.
    """
    while isinstance(code, functools.partial) or hasattr(code, "_torchdynamo_orig_callable"):
        code = code.func if isinstance(code, functools.partial) else code._torchdynamo_orig_callable
    code = getattr(code, "__func__", code)
    if hasattr(code, "__globals__"):
        return f"{code.__globals__.get('__name__', '')}."
    named = code if isinstance(code, (type, types.BuiltinFunctionType)) else type(code)
    return f"{named.__module__}."
