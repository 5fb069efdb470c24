"""Mixture-of-experts modules whose experts share batched weights.

transformers runs them through several implementations. All but the eager loop call `_apply_gate`, which is traced and
fused like any other method. Most eager loops spell `self.act_fn(gate) * up` out instead, and cannot be traced because
they loop over whatever experts were hit. There the activation waits until it is multiplied, and the product of the two
is fused; a pending activation that meets anything else becomes what it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_swiglu import functional
from hf_swiglu.fusion import is_needed
from hf_swiglu.recognition import GatedProduct
from hf_swiglu.reference import Gating

_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


class PendingActivation:
    """`activation(gate)`, not computed yet. Not a tensor, but every tensor function takes it for one."""

    def __init__(self, gate: Tensor, activation: nn.Module, gating: Gating):
        self._gate, self._activation, self._gating = gate, activation, gating

    def value(self) -> Tensor:
        return self._activation(self._gate)

    def __mul__(self, up):
        if isinstance(up, Tensor):
            return functional.gated_product(self._gate, up, self._gating)
        return self.value() * up

    __rmul__ = __mul__

    def __getattr__(self, name: str):
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in _MULTIPLY and len(args) == 2 and not kwargs:
            up, pending = args
            return pending * up if isinstance(pending, cls) else up * pending
        return function(*map(_value, args), **{name: _value(value) for name, value in (kwargs or {}).items()})


def _value(argument):
    return argument.value() if isinstance(argument, PendingActivation) else argument


class WaitingActivation:
    """The activation module itself to whoever looks at it; called, it waits."""

    def __init__(self, module: nn.Module, gating: Gating):
        vars(self).update(_module=module, _gating=gating)

    def __call__(self, gate: Tensor) -> PendingActivation:
        return PendingActivation(gate, self._module, self._gating)

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self._module)


def eager_members(original: type[nn.Module], found: GatedProduct) -> dict[str, object]:
    """What a fused experts class needs besides `_apply_gate`: the pending activation for its eager loop."""
    child = found.activated.child
    eager = getattr(original.forward, "__wrapped__", original.forward)
    if found.method == "forward" or child is None or found.gating is None or "_apply_gate" in eager.__code__.co_names:
        return {}
    gating = found.gating

    def activation(self: nn.Module):
        module: Any = self._modules[child]
        if torch.compiler.is_compiling() or is_needed(module, gating.power):
            return module
        return WaitingActivation(module, gating)

    # A property is found before nn.Module looks among the children, which keep the module itself.
    return {child: property(activation)}
