"""Kernels for meta tensors, which have shapes and no memory: nothing is computed.

With them `dispatch` chooses the same paths on the meta device as on a GPU, so that memory can be predicted.
"""

from __future__ import annotations

from torch import Tensor

from hf_swiglu.reference import GLUParams


def swiglu_fwd(gate: Tensor, up: Tensor | None, out: Tensor, params: GLUParams) -> None:
    """Does nothing: `out` has its shape already."""


def swiglu_bwd(
    grad_out: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, params: GLUParams
) -> None:
    """Does nothing: the gradients have their shapes already."""
