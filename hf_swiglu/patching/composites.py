"""Down projections with dropout inside, LoRA's: mask and dropped product are computed again in backward.

They run under PyTorch's non-reentrant checkpointing, which draws the same mask again. The results of their matrix
products are kept, so that none of those runs again: they are as wide as the module's output, or narrower. PyTorch's
selective checkpointing does as much, but allows no second backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_swiglu import _compat

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten._scaled_mm}
_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)


def call(down: nn.Module, product: Tensor) -> Tensor:
    """`down(product)`, which keeps no mask for backward."""
    if not drops(down):
        return down(product)
    return checkpoint(down, product, use_reentrant=False, context_fn=_contexts)


def drops(module: nn.Module) -> bool:
    """Whether a dropout inside is active."""
    if not module._modules:
        return False
    return any(isinstance(each, _DROPOUTS) and each.training and each.p > 0 for each in module.modules())


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    results: list[tuple[Tensor, int]] = []
    return _Keeping(results), _Reusing(results)


class _Keeping(TorchDispatchMode):
    """Keeps the results of matrix products, each with its version."""

    def __init__(self, results: list[tuple[Tensor, int]]):
        super().__init__()
        self._results = results

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket in _MATRIX_PRODUCTS:
            # Autograd will make `out` itself a part of its graph.
            self._results.append((out.detach(), out._version))
        return out


class _Reusing(TorchDispatchMode):
    """Hands them out again in their order, but for those that were written to since."""

    def __init__(self, results: list[tuple[Tensor, int]]):
        super().__init__()
        self._results, self._at = results, 0

    def __enter__(self):
        self._at = 0
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in _MATRIX_PRODUCTS and self._at < len(self._results):
            out, version = self._results[self._at]
            self._at += 1
            if out._version == version:
                return out.detach()
        return operator(*args, **(kwargs or {}))


# Both see matrix products only while a down projection is called, and change nothing.
_compat.passive_modes.update((_Keeping, _Reusing))
