"""The products as nodes of autograd's graph: what they keep for backward, and how they compute it again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_swiglu import backends, reference
from hf_swiglu.reference import LAYOUTS, Gating


def new_product(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    """The product in new memory, by the kernel of gate's device."""
    out = torch.empty_like(gate)
    backends.product(gate, up, out, backends.scalars(gating))
    return out


class Product(torch.autograd.Function):
    """Saves gate and up, nothing else. `up` may be None: the gate's activation alone."""

    @staticmethod
    def forward(ctx, gate, up, gating):
        ctx.save_for_backward(gate, up)
        ctx.gating, ctx.layout, ctx.unpacked = gating, None, None
        return new_product(gate, up, gating)

    @staticmethod
    def backward(ctx, grad):
        gate, up = _unpack_last(ctx)
        if _needs_plain_gradients(grad):
            return *_plain_gradients(ctx, (gate, up), grad), None
        grad_gate = torch.empty_like(gate)
        grad_up = None if up is None else torch.empty_like(up)
        backends.product_backward(grad, gate, up, grad_gate, grad_up, backends.scalars(ctx.gating))
        return grad_gate, grad_up, None


class PackedProduct(torch.autograd.Function):
    """Saves the packed tensor, and writes both parts of its gradient in place."""

    @staticmethod
    def forward(ctx, gate_up, gating, layout):
        ctx.save_for_backward(gate_up)
        ctx.gating, ctx.layout, ctx.unpacked = gating, layout, None
        gate, up = LAYOUTS[layout](gate_up)
        return new_product(gate, up, gating)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = _unpack_last(ctx)
        if _needs_plain_gradients(grad):
            return *_plain_gradients(ctx, (gate_up,), grad), None, None
        parts = LAYOUTS[ctx.layout]
        grad_gate_up = torch.empty_like(gate_up)
        backends.product_backward(grad, *parts(gate_up), *parts(grad_gate_up), backends.scalars(ctx.gating))
        return grad_gate_up, None, None


def is_transformed() -> bool:
    """Whether vmap, grad or jvp wrap tensors here, or attach tangents, that a kernel would drop."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _needs_plain_gradients(grad: Tensor) -> bool:
    """Whether gradients of gradients are asked for, or a batch of them at once, or grad is not what its memory says."""
    return (
        torch.is_grad_enabled()
        or is_transformed()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
        or grad.is_neg()
    )


def _plain_gradients(node, saved: tuple, grad: Tensor) -> list[Tensor | None]:
    """PyTorch's own gradients of the plain formula, which can be differentiated and batched again.

    Through fresh views: gate may be made from up, or be the same tensor, and autograd would follow it there.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views: list = [None if tensor is None else tensor.view_as(tensor) for tensor in saved]
        product = reference.product(*_gate_and_up(node, *views), node.gating)
    wanted = [view for view in views if view is not None]
    gradients = iter(torch.autograd.grad(product, wanted, grad, create_graph=create_graph))
    return [None if view is None else next(gradients) for view in views]


def can_recompute(node: object) -> bool:
    """Whether this is the graph node of a product that a kernel computed."""
    return isinstance(node, (Product._backward_cls, PackedProduct._backward_cls))


def recompute(node) -> Tensor:
    """The product that `node` stands for, from the tensors that it saved."""
    return new_product(*_gate_and_up(node, *_unpack(node)), node.gating)


def _gate_and_up(node, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    if node.layout is None:
        return first, second
    gate, up = LAYOUTS[node.layout](first)
    return gate, up


def _unpack(node) -> tuple[Tensor, ...]:
    """The node's saved tensors, unpacked once in each backward pass: non-reentrant checkpointing allows no second
    time, and the recomputation and the node's own backward both need them."""
    task = torch._C._current_graph_task_id()
    if node.unpacked is None or node.unpacked[0] != task:
        node.unpacked = (task, node.saved_tensors)
    return node.unpacked[1]


def _unpack_last(node) -> tuple[Tensor, ...]:
    if node.unpacked is None:
        return node.saved_tensors
    tensors = _unpack(node)
    node.unpacked = None
    return tensors
