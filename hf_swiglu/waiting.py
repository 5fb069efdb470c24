"""Products in methods that cannot be traced, such as loops over whatever experts were hit.

There the activation waits until it is multiplied, and the product of the two is fused. Only an activation that its
class multiplies wherever it calls it may wait; should a waiting one meet anything else after all, it becomes what it
stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_swiglu import functional
from hf_swiglu.fusion import is_watched
from hf_swiglu.patterns import attribute_gating
from hf_swiglu.purity import multiplied_attributes
from hf_swiglu.recognition import GatedProduct, Product
from hf_swiglu.reference import Gating

_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


class PendingActivation:
    """`activation(gate)`, not computed yet. Not a tensor, but every tensor function takes it for one."""

    def __init__(self, gate: Tensor, activation: Callable[[Tensor], Tensor], gating: Gating):
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
    """The activation itself to whoever looks at it; called, it waits."""

    def __init__(self, activation: Callable[[Tensor], Tensor], gating: Gating):
        vars(self).update(_activation=activation, _gating=gating)

    def __call__(self, gate: Tensor) -> PendingActivation:
        return PendingActivation(gate, self._activation, self._gating)

    def __getattr__(self, name: str):
        return getattr(self._activation, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._activation, name, value)

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self._activation)


def waiting_members(original: type[nn.Module], found: Product) -> dict[str, object]:
    """What a fused class needs where its own method still computes the product: activations that wait."""
    if isinstance(found, GatedProduct) and found.method == "forward":
        return {}
    # A property is found before the attribute, and before nn.Module looks among the children, which stay as they are.
    return {name: property(_waiting(name)) for name in multiplied_attributes(original)}  # type: ignore[arg-type]


def _waiting(name: str) -> Callable[[nn.Module], object]:
    def activation(self: nn.Module):
        value: Any = self._modules[name] if name in self._modules else vars(self)[name]
        gating = attribute_gating(value)
        if gating is None or torch.compiler.is_compiling() or (isinstance(value, nn.Module) and is_watched(value)):
            return value
        return WaitingActivation(value, gating)

    return activation
