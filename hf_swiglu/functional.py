"""The public functions: validation, autograd, and the choice between a kernel and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_swiglu import backends, reference
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
        return gated_product(gate, None, SWIGLU)
    if not isinstance(up, Tensor) or up.dtype is not gate.dtype:
        _check_floating("swiglu", "up", up)
        common = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(common), up.to(common)
    _check_alike(gate, up)
    return gated_product(gate, up, SILU)


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
    # The smallest tensors are asked about first: each question takes a fiftieth of the time that their product takes,
    # and F.silu in place of what it calls, a fifteenth.
    if backends.is_tiny(gate):
        if gating is SILU and up is not None:
            return torch._C._nn.silu(gate) * up
        return reference.product(gate, up, gating)
    differentiated = torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    if not _kernel_serves(gate, up, differentiated):
        return reference.product(gate, up, gating)
    if not differentiated:
        return _forward(gate, up, gating)
    if gate.requires_grad and (up is None or up.requires_grad):
        return _Product.apply(gate, up, gating)
    # With one of the two frozen, eager autograd already keeps just what the other's gradient needs.
    return reference.product(gate, up, gating)


# Where gate and up lie in a packed tensor [..., 2 * I]; all are views.
LAYOUTS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "gate_up": lambda packed: packed.chunk(2, dim=-1),
    "up_gate": lambda packed: packed.chunk(2, dim=-1)[::-1],
    "interleaved": lambda packed: (packed[..., ::2], packed[..., 1::2]),
}


def packed_product(gate_up: Tensor, gating: Gating = SILU, layout: str = "gate_up") -> Tensor:
    """`gated_product` of a packed tensor [..., 2 * I]; one buffer is kept for backward, and one is written."""
    if gate_up.requires_grad and torch.is_grad_enabled() and _kernel_serves(gate_up, None, True):
        return _PackedProduct.apply(gate_up, gating, layout)
    gate, up = LAYOUTS[layout](gate_up)
    return gated_product(gate, up, gating)


def product_into_gate(gate: Tensor, up: Tensor, gating: Gating = SILU) -> Tensor:
    """`gated_product` without gradients, written over `gate`: only for a caller that owns `gate` alone."""
    if backends.is_tiny(gate) or not _kernel_serves(gate, up, differentiated=False):
        return reference.product(gate, up, gating)
    backends.product(gate, up, gate, _scalars(gating))
    return gate


def _kernel_serves(gate: Tensor, up: Tensor | None, differentiated: bool) -> bool:
    """Whether these are ordinary tensors, in an ordinary context, of a device, dtype and size with a kernel."""
    # Inductor fuses the plain formula with its neighbours and decides what to keep; an operator would be a wall.
    if torch.compiler.is_compiling() or not backends.serves(gate, differentiated) or not _is_ordinary(gate):
        return False
    if _is_transformed() or torch._C._is_tracing():
        return False
    return up is None or (
        _is_ordinary(up) and up.dtype == gate.dtype and up.shape == gate.shape and up.device == gate.device
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        # Packed halves have columns at stride 1, interleaved ones at 2. A transposed [1024, 4096] is eager's: 6.6 ms
        # against 45 ms and more (float32, EPYC 7003).
        and (tensor.is_contiguous() or tensor.stride(-1) in (1, 2))
    )


def _is_transformed() -> bool:
    """Whether vmap, grad or jvp wrap tensors here, or attach tangents, that a kernel would drop."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _forward(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    out = torch.empty_like(gate)
    backends.product(gate, up, out, _scalars(gating))
    return out


def _scalars(gating: Gating) -> tuple:
    """The operators' last arguments; `_ops` says why the usual ones are left out."""
    if gating is SILU or gating == SILU:
        return ()
    if gating == SWIGLU:
        return (2,)
    return gating.power, list(gating[1:])


class _Product(torch.autograd.Function):
    """Saves gate and up, nothing else. `up` may be None: the gate's activation alone."""

    @staticmethod
    def forward(ctx, gate, up, gating):
        ctx.save_for_backward(gate, up)
        ctx.gating, ctx.parts = gating, lambda gate, up: (gate, up)
        return _forward(gate, up, gating)

    @staticmethod
    def backward(ctx, grad):
        gate, up = _unpack_last(ctx)
        if _needs_plain_gradients(grad):
            return *_plain_gradients(ctx, (gate, up), grad), None
        grad_gate = torch.empty_like(gate)
        grad_up = None if up is None else torch.empty_like(up)
        backends.product_backward(grad, gate, up, grad_gate, grad_up, _scalars(ctx.gating))
        return grad_gate, grad_up, None


class _PackedProduct(torch.autograd.Function):
    """Saves the packed tensor, and writes both parts of its gradient in place."""

    @staticmethod
    def forward(ctx, gate_up, gating, layout):
        ctx.save_for_backward(gate_up)
        ctx.gating, ctx.parts = gating, LAYOUTS[layout]
        gate, up = ctx.parts(gate_up)
        return _forward(gate, up, gating)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = _unpack_last(ctx)
        if _needs_plain_gradients(grad):
            return *_plain_gradients(ctx, (gate_up,), grad), None, None
        gate, up = ctx.parts(gate_up)
        grad_gate_up = torch.empty_like(gate_up)
        backends.product_backward(grad, gate, up, *ctx.parts(grad_gate_up), _scalars(ctx.gating))
        return grad_gate_up, None, None


def _needs_plain_gradients(grad: Tensor) -> bool:
    """Whether gradients of gradients are asked for, or a batch of them at once."""
    return torch.is_grad_enabled() or _is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _plain_gradients(ctx, saved: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """PyTorch's own gradients of the plain formula, which can be differentiated and batched again.

    Through fresh views: gate may be made from up, or be the same tensor, and autograd would follow it there.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in saved]
        gate, up = ctx.parts(*views)
        product = reference.product(gate, up, ctx.gating)
    wanted = [view for view in views if view is not None]
    gradients = iter(torch.autograd.grad(product, wanted, grad, create_graph=create_graph))
    return [None if view is None else next(gradients) for view in views]


def can_recompute(node: object) -> bool:
    """Whether this is the graph node of a product that a kernel computed."""
    return isinstance(node, (_Product._backward_cls, _PackedProduct._backward_cls))


def recompute(node) -> Tensor:
    """The product that `node` stands for, from the tensors that it saved."""
    gate, up = node.parts(*_unpack(node))
    return _forward(gate, up, node.gating)


def _unpack(node) -> tuple[Tensor, ...]:
    """The node's saved tensors, unpacked once in each backward pass: non-reentrant checkpointing allows no second
    time, and the recomputation and the node's own backward both need them."""
    task = torch._C._current_graph_task_id()
    known = getattr(node, "unpacked", None)
    if known is None or known[0] != task:
        node.unpacked = known = (task, node.saved_tensors)
    return known[1]


def _unpack_last(node) -> tuple[Tensor, ...]:
    tensors = _unpack(node)
    del node.unpacked
    return tensors


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
