"""The product as a node of autograd's graph: what it saves for backward, and how it is computed again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from hf_swiglu import _compat, reference
from hf_swiglu._ops import launch_bwd, launch_fwd
from hf_swiglu.interception import is_transformed
from hf_swiglu.reference import LAYOUTS, GLUParams


def new_product(gate: Tensor, up: Tensor | None, params: GLUParams) -> Tensor:
    """The product in new memory, by the kernel of gate's device."""
    out = torch.empty_like(gate)
    launch_fwd(gate, up, out, params)
    return out


class SwiGLUFunction(torch.autograd.Function):
    """Saves gate and up, nothing else. `up` may be None: the gate's activation alone."""

    @staticmethod
    def forward(ctx, gate, up, params):
        ctx.save_for_backward(gate, up)
        ctx.params, ctx.layout, ctx.unpacked, ctx.saved_like = params, None, None, (gate.dtype, gate.shape)
        return new_product(gate, up, params)

    @staticmethod
    def backward(ctx, grad):
        return *_untraced(_gradients, ctx, grad), None


class PackedSwiGLUFunction(torch.autograd.Function):
    """Saves the packed tensor; backward writes both halves of its gradient into one tensor."""

    @staticmethod
    def forward(ctx, gate_up, params, layout):
        ctx.save_for_backward(gate_up)
        ctx.params, ctx.layout, ctx.unpacked, ctx.saved_like = params, layout, None, (gate_up.dtype, gate_up.shape)
        gate, up = LAYOUTS[layout](gate_up)
        return new_product(gate, up, params)

    @staticmethod
    def backward(ctx, grad):
        return *_untraced(_gradients, ctx, grad), None, None


def _gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    saved = _unpack_last(ctx)
    if _needs_plain_gradients(grad, saved) or not all(_is_plain(tensor, grad) for tensor in saved):
        return _plain_gradients(ctx, saved, grad)
    gate, up = _gate_and_up(ctx, *saved)
    if ctx.layout is not None:
        grad_gate_up = torch.empty_like(saved[0])
        launch_bwd(grad, gate, up, *_gate_and_up(ctx, grad_gate_up), ctx.params)  # type: ignore[call-arg]
        return [grad_gate_up]
    grad_gate = torch.empty_like(gate)
    grad_up = None if up is None else torch.empty_like(up)
    launch_bwd(grad, gate, up, grad_gate, grad_up, ctx.params)
    return [grad_gate, grad_up]


_without_compiler = functools.cache(lambda function: torch.compiler.disable(function))


def _untraced(function: Callable, *args):
    """`function(*args)`, untraced by compiled autograd: proofs of ownership and version counters do not hold for traced
    tensors.

    `torch.compiler.disable` imports the compiler, so it is applied only once the compiler has been imported.
    """
    return (_without_compiler(function) if "torch._dynamo" in sys.modules else function)(*args)


_untraced._torchdynamo_disable = True  # type: ignore[attr-defined]


def _needs_plain_gradients(grad: Tensor, saved: tuple) -> bool:
    """Whether backward is differentiated or batched itself, or grad is a view with a pending negation."""
    tensors = (grad, *(tensor for tensor in saved if tensor is not None))
    return (
        # Compiled autograd leaves gradients enabled, for tensors that require none.
        (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or is_transformed()
        or _compat.is_legacy_batched(grad)
        or grad.is_neg()
    )


def _is_plain(tensor: Tensor | None, grad: Tensor) -> bool:
    """Whether a kernel may read a saved tensor: a hook may have returned a subclass, or moved it to another device."""
    return tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == grad.device)


def _plain_gradients(node, saved: tuple, grad: Tensor) -> list[Tensor | None]:
    """PyTorch's own gradients of the plain formula, which can be differentiated and batched again.

    With respect to new views: gate may be computed from up, or be the same tensor, which would add to the gradient.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views: list = [None if tensor is None else tensor.view_as(tensor) for tensor in saved]
        for view in views:
            if view is not None and not view.requires_grad:
                view.requires_grad_()
        product = reference.swiglu_fwd(*_gate_and_up(node, *views), node.params)
    wanted = [view for view in views if view is not None]
    gradients = iter(torch.autograd.grad(product, wanted, grad, create_graph=create_graph))
    return [None if view is None else next(gradients) for view in views]


def can_recompute(node: object) -> bool:
    """Whether this is the graph node of a product that a kernel computed."""
    return isinstance(node, _compat.node_classes((SwiGLUFunction, PackedSwiGLUFunction)))


def recomputation(node, *, holds_tensors: bool) -> Callable[[], Tensor]:
    """A function that computes the product of `node` again.

    Where saved-tensor hooks are active it unpacks the node's saved tensors when it runs: gradient checkpointing drops
    them after forward, `save_on_cpu` moves them. Elsewhere it `holds_tensors` itself: compiled autograd frees nodes
    before it runs backward.
    """
    if not holds_tensors:
        return lambda: new_product(*_gate_and_up(node, *_unpack(node)), node.params)
    saved = [tensor for tensor in node.saved_tensors if tensor is not None]
    versions = [tensor._version for tensor in saved]
    return functools.partial(_untraced, _product_of, node.params, node.layout, saved, versions)


def _product_of(params: GLUParams, layout: str | None, saved: list[Tensor], versions: list[int]) -> Tensor:
    if [tensor._version for tensor in saved] != versions:
        raise RuntimeError(
            "hf_swiglu: gate or up, which backward needs, has been modified by an inplace operation after the product "
            "was computed. Clone it first, or patch with keep=3 and find it by PyTorch's own error"
        )
    gate, up = saved if layout is None else LAYOUTS[layout](saved[0])
    return new_product(gate, up, params)


def _gate_and_up(node, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    if node.layout is None:
        return first, second
    gate, up = LAYOUTS[node.layout](first)
    return gate, up


def _unpack(node) -> tuple[Tensor, ...]:
    """The node's saved tensors, unpacked once in each backward pass: non-reentrant checkpointing allows no second
    time, and the recomputation and the node's own backward both need them."""
    task = _compat.graph_task()
    if node.unpacked is None or node.unpacked[0] != task:
        node.unpacked = (task, _as_saved(node))
    return node.unpacked[1]


def _unpack_last(node) -> tuple[Tensor, ...]:
    if node.unpacked is None:
        return _as_saved(node)
    tensors = _unpack(node)
    node.unpacked = None
    return tensors


def _as_saved(node) -> tuple:
    """The saved tensors, in the dtype in which they were saved: a hook may have kept them in a narrower one."""
    dtype, shape = node.saved_like
    result = []
    for tensor in node.saved_tensors:
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"hf_swiglu: a saved-tensor hook returned a tensor of shape {tuple(tensor.shape)} for one of "
                f"{tuple(shape)}, which the product's backward needs"
            )
        result.append(tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype))
    return tuple(result)
