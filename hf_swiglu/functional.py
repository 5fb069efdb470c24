"""The public functions: validation, autograd, and the choice between a kernel and plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_swiglu import _ops, backends, reference
from hf_swiglu.reference import SILU, SWIGLU, Gating


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
    _check_floating("swiglu", "gate", gate)
    if up is None:
        return _product(gate, None, SWIGLU)
    _check_pair("swiglu", gate, up)
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
    return packed_product(gate_up, SILU)


def gated_product(gate: Tensor, up: Tensor, gating: Gating = SILU) -> Tensor:
    """The product of any member of the family, see `reference.Gating`; what a fused MLP calls."""
    _check_floating("gated_product", "gate", gate)
    _check_pair("gated_product", gate, up)
    return _product(gate, up, gating)


def packed_product(gate_up: Tensor, gating: Gating = SILU) -> Tensor:
    """`gated_product` of the two halves of the last dimension; one buffer is kept for backward, and one written."""
    if _kernel_serves(gate_up) and _needs_grad(gate_up):
        return _PackedProduct.apply(gate_up, gating)
    return _product(*gate_up.chunk(2, dim=-1), gating)


def product_into_gate(gate: Tensor, up: Tensor, gating: Gating = SILU) -> Tensor:
    """`gated_product` without gradients, written over `gate`: only for a caller that owns `gate` alone."""
    if gate.dtype == up.dtype and _kernel_serves(gate, up):
        _ops.product(gate, up, gate, *_scalars(gating))
        return gate
    return _product(gate, up, gating)


def _product(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    # Inductor fuses the plain formula with its neighbours and decides what to keep; an operator would be a wall.
    if torch.compiler.is_compiling():
        return reference.product(gate, up, gating)
    if not (_kernel_serves(gate) if up is None else gate.dtype == up.dtype and _kernel_serves(gate, up)):
        return reference.product(gate, up, gating)
    if not torch.is_grad_enabled():
        return _forward(gate, up, gating)
    if up is None:
        return _SelfGated.apply(gate, gating) if gate.requires_grad else _forward(gate, None, gating)
    if gate.requires_grad and up.requires_grad:
        return _Product.apply(gate, up, gating)
    # With one of the two frozen, eager autograd already keeps just what the other's gradient needs.
    if gate.requires_grad or up.requires_grad:
        return reference.product(gate, up, gating)
    return _forward(gate, up, gating)


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _kernel_serves(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors, in an ordinary context, of a device, dtype and size with a kernel."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    # vmap, grad and jvp wrap tensors or attach tangents that a kernel would drop.
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return backends.serves(tensors[0])


def _forward(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _ops.product(gate, up, out, *_scalars(gating))
    return out


def _scalars(gating: Gating) -> tuple:
    if gating is SILU:
        return ()
    if gating is SWIGLU:
        return (2,)
    return gating.power, list(gating[1:])


def _differentiable_backward(grad: Tensor, inputs: tuple[Tensor, ...], gating: Gating):
    """Gradients that can themselves be differentiated: PyTorch's own, of the plain formula."""
    with torch.enable_grad():
        gate, up = inputs if len(inputs) == 2 else (inputs[0], None)
        return torch.autograd.grad(reference.product(gate, up, gating), inputs, grad, create_graph=True)


class _SelfGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, gating):
        ctx.save_for_backward(gate)
        ctx.gating = gating
        return _forward(gate, None, gating)

    @staticmethod
    def backward(ctx, grad):
        (gate,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(grad, (gate,), ctx.gating), None
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _ops.product_backward(grad, gate, None, grad_gate, None, *_scalars(ctx.gating))
        return grad_gate, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gating):
        ctx.save_for_backward(gate, up)
        ctx.gating = gating
        return _forward(gate, up, gating)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(grad, (gate, up), ctx.gating), None
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        _ops.product_backward(grad, gate, up, grad_gate, grad_up, *_scalars(ctx.gating))
        return grad_gate, grad_up, None


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, gating):
        ctx.save_for_backward(gate_up)
        ctx.gating = gating
        return _forward(*gate_up.chunk(2, dim=-1), gating)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.enable_grad():
                packed = reference.product(*gate_up.chunk(2, dim=-1), ctx.gating)
                return *torch.autograd.grad(packed, (gate_up,), grad, create_graph=True), None
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        _ops.product_backward(
            grad, *gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1), *_scalars(ctx.gating)
        )
        return grad_gate_up, None


def _check_floating(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{function}: {name} must have a real floating-point dtype (float32, bfloat16, float16, float64); "
            f"got {value.dtype}. Convert it first, for instance {name}.float()"
        )


def _check_pair(function: str, gate: Tensor, up: object) -> None:
    _check_floating(function, "up", up)
    if gate.shape != up.shape:
        raise ValueError(
            f"{function}: gate and up must have the same shape; got gate {tuple(gate.shape)} and up {tuple(up.shape)}"
        )
    if gate.device != up.device:
        raise ValueError(
            f"{function}: gate and up must be on the same device; got gate on {gate.device} and up on {up.device}"
        )
