"""The public functions: validation, and the choice between a kernel and plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_swiglu import autograd, backends, direct, reference
from hf_swiglu.reference import LAYOUTS, SILU, SWIGLU, Gating


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    r"""SwiGLU of one tensor (self-gated) or of two (gated).

        swiglu(x)        = x * swish(x)        swish(x) = x * sigmoid(x)
        swiglu(gate, up) = swish(gate) * up

    The two-tensor form is the one of Shazeer, "GLU Variants Improve Transformer" (2020,
    https://arxiv.org/abs/2002.05202), which LLaMA computes with `hidden_act="silu"`; the one-tensor form is its
    case `gate = up = x`, and what `hidden_act="swiglu"` names.

    Args:
        gate: floating-point tensor of any shape.
        up: tensor of gate's shape on gate's device. Mixed floating dtypes follow PyTorch's promotion.

    Returns:
        A tensor of the same shape. Arithmetic is float32 (float64 for float64), rounded once at the end, where a
        kernel runs; see `available_backends`.

    Raises:
        TypeError: an argument is not a tensor, or not of a real floating-point dtype.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch
        >>> from hf_swiglu import swiglu
        >>> swiglu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.2689, 0.0000, 3.5232])
        >>> swiglu(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
        tensor([ 2.1932, -1.7616])
    """
    result = direct.product(gate, up, SWIGLU if up is None else SILU)
    if result is not None:
        return result
    _check_floating("swiglu", "gate", gate)
    if up is None:
        return _product(gate, None, SWIGLU)
    if not isinstance(up, Tensor) or up.dtype is not gate.dtype:
        _check_floating("swiglu", "up", up)
        common = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(common), up.to(common)
    _check_alike(gate, up)
    return _product(gate, up, SILU)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    r"""Gated SwiGLU of a packed tensor, without copying either half.

        gate, up = gate_up.chunk(2, dim=-1)        swiglu_packed(gate_up) = swish(gate) * up

    Args:
        gate_up: floating-point tensor `[..., 2 * I]`, gate first (Phi-3, GLM-4, most mixtures of experts).

    Returns:
        A tensor `[..., I]`.

    Raises:
        TypeError: not a tensor, or not of a real floating-point dtype.
        ValueError: no last dimension, or one of odd width.

    Example:
        >>> import torch
        >>> from hf_swiglu import swiglu_packed
        >>> swiglu_packed(torch.tensor([[1.0, 2.0, 3.0, -1.0]]))
        tensor([[ 2.1932, -1.7616]])
    """
    _check_floating("swiglu_packed", "gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu_packed: the last dimension holds gate and up side by side, so its width must be even; "
            f"got gate_up of shape {tuple(gate_up.shape)}"
        )
    return packed_product(gate_up)


def gated_product(gate: Tensor, up: Tensor | None, gating: Gating = SILU) -> Tensor:
    """The product of any member of the family, see `reference.Gating`; without `up`, the activation alone.

    Unchecked: what no kernel takes, broadcasting included, is left to plain PyTorch and its errors.
    """
    result = direct.product(gate, up, gating)
    return _product(gate, up, gating) if result is None else result


def _product(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    differentiated = torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    if not _kernel_serves(gate, up, differentiated):
        return reference.product(gate, up, gating)
    if not differentiated:
        return autograd.new_product(gate, up, gating)
    if gate.requires_grad and (up is None or up.requires_grad):
        return autograd.Product.apply(gate, up, gating)
    # With one of the two frozen, eager autograd already keeps just what the other's gradient needs.
    return reference.product(gate, up, gating)


def packed_product(gate_up: Tensor, gating: Gating = SILU, layout: str = "gate_up") -> Tensor:
    """`gated_product` of a packed tensor [..., 2 * I]; one buffer is kept for backward, and one is written."""
    result = direct.packed_product(gate_up, gating) if layout == "gate_up" else None
    if result is not None:
        return result
    differentiated = gate_up.requires_grad and torch.is_grad_enabled()
    if differentiated and _kernel_serves(gate_up, None, True, elements=gate_up.numel() // 2):
        return autograd.PackedProduct.apply(gate_up, gating, layout)
    gate, up = LAYOUTS[layout](gate_up)
    return (reference.product if differentiated else gated_product)(gate, up, gating)


def product_into_gate(gate: Tensor, up: Tensor, gating: Gating = SILU) -> Tensor:
    """`gated_product` without gradients, written over `gate`: only for a caller that owns `gate` alone."""
    result = direct.product(gate, up, gating, out=gate)
    if result is not None:
        return result
    if not _go_together(gate, up):
        return reference.product(gate, up, gating)
    if not backends.serves(gate, gate.numel(), differentiated=False):
        return reference.product_into_gate(gate, up, gating)
    backends.product(gate, up, gate, backends.scalars(gating))
    return gate


def _kernel_serves(gate: Tensor, up: Tensor | None, differentiated: bool, elements: int | None = None) -> bool:
    """Whether these are ordinary tensors, in an ordinary context, of a device, dtype and size with a kernel."""
    # Inductor fuses the plain formula with its neighbours and decides what to keep; an operator would be a wall.
    if torch.compiler.is_compiling():
        return False
    elements = gate.numel() if elements is None else elements
    return backends.serves(gate, elements, differentiated) and _go_together(gate, up)


def _go_together(gate: Tensor, up: Tensor | None) -> bool:
    """Whether these are ordinary tensors, alike, in an ordinary context, so that one may be written over the other."""
    if torch.compiler.is_compiling() or not _is_ordinary(gate) or autograd.is_transformed() or torch._C._is_tracing():
        return False
    return up is None or (
        _is_ordinary(up) and up.dtype == gate.dtype and up.shape == gate.shape and up.device == gate.device
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        # Packed halves have columns at stride 1, interleaved ones at 2. A transposed [1024, 4096] is eager's: 6.6 ms
        # against 45 ms and more (float32, EPYC 7003).
        and (tensor.is_contiguous() or tensor.stride(-1) in (1, 2))
    )


def _check_floating(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{function}: {name} must have a real floating-point dtype (float32, bfloat16, float16, float64); "
            f"got {value.dtype}. Convert it first, for instance {name}.float()"
        )


def _check_alike(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: gate and up must have the same shape; got gate {tuple(gate.shape)} and up {tuple(up.shape)}"
        )
    if gate.device != up.device:
        raise ValueError(
            f"swiglu: gate and up must be on the same device; got gate on {gate.device} and up on {up.device}"
        )
