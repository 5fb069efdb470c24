"""keep=0 and keep=1: what stands before the down projection is computed again in backward.

A module's forward runs under PyTorch's non-reentrant checkpointing, which restores random numbers and autocast and
nests inside other checkpointing. Checkpointing alone would call the down projection again, whose output backward never
needs. So down is called outside of checkpointing's hooks: what it saves stays in the graph as without checkpointing,
but for the product, which is packed as "what the recomputation makes" and is the last tensor that is asked of it. With
keep=1 the first projection is called outside of the hooks too, and its output is kept.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_swiglu import _compat
from hf_swiglu.patching import composites, recompute

_state = threading.local()


def run(forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`forward(*args)`, computed again in backward up to its call of `project`."""
    return checkpoint(_Region(forward), *args, use_reentrant=False)


def project(down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """`down(product)`: where rewritten forwards call the projection that takes the product."""
    region = getattr(_state, "region", None)
    return recompute.project(down, product) if region is None else region.project(down, product)


def kept(projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`projection(x)`: where rewritten forwards of keep=1 call the projection whose output is kept."""
    region = getattr(_state, "region", None)
    return projection(x) if region is None else region.kept(projection, x)


class _Region:
    """One call of a forward, and its recomputations."""

    def __init__(self, forward: Callable[..., Tensor]):
        self._forward = forward
        self._has_run = self._is_again = False
        # For each output that is kept: a tensor whose node has saved it, and whether it requires a gradient.
        # And the random numbers' state behind the call, where it drew some.
        self._kept: list[tuple[Tensor, bool, Callable[[], None] | None] | None] = []
        self._at = 0
        # For each call of a down projection, whether it is left out of what is computed again.
        self._is_left_out: list[bool] = []
        self._calls = 0
        # Checkpointing's hooks, while the forward runs.
        self._hooks: tuple[Callable, Callable] | None = None

    def __call__(self, *args: Tensor) -> Tensor:
        self._is_again, self._has_run, self._at, self._calls = self._has_run, True, 0, 0
        before, self._hooks = getattr(_state, "region", None), _compat.saved_tensors_default_hooks()
        _state.region = self
        try:
            return self._forward(*args)
        finally:
            # The hooks hold the checkpoint, which holds this object.
            _state.region, self._hooks = before, None

    def project(self, down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
        if not self._is_again:
            self._is_left_out.append(self._can_be_left_out(down, product))
        is_left_out = self._is_left_out[self._calls]
        self._calls += 1
        if not is_left_out:
            return down(product)
        holder = _Saved.apply(_requiring_gradient(), product)
        # A recomputation comes this far only if something behind down has saved a tensor as well.
        return self._outside(down, product) if self._is_again else self._outside(_call, down, product, holder)

    def _can_be_left_out(self, down: Callable[[Tensor], Tensor], product: Tensor) -> bool:
        return (
            isinstance(down, nn.Module)
            and type(product) is Tensor
            and product.numel() > 0
            and self._is_innermost()
            and recompute.leaves_its_input_alone(down)
        )

    def kept(self, projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._is_again:
            entry = self._kept[self._at]
            self._at += 1
            if entry is None:
                return projection(x)
            holder, requires_grad, draw_again = entry
            if draw_again is not None:
                draw_again()
            (output,) = holder.grad_fn.saved_tensors  # type: ignore[union-attr]
            return output.detach().requires_grad_(requires_grad)
        if not self._is_innermost() or not isinstance(projection, nn.Module):
            self._kept.append(None)
            return projection(x)
        output = self._outside(projection, x)
        holder = self._outside(_Saved.apply, _requiring_gradient(), output)
        draw_again = _random_state(output.device) if composites.drops(projection) else None
        self._kept.append((holder, output.requires_grad, draw_again))
        return output

    def _is_innermost(self) -> bool:
        """Whether the hooks that apply here are checkpointing's, and not ones that the forward has set inside."""
        hooks = _compat.saved_tensors_default_hooks()
        return self._hooks is not None and hooks is not None and hooks[0] is self._hooks[0]

    def _outside(self, function: Callable, *args: Any) -> Any:
        """`function(*args)` with the hooks that applied around this region."""
        assert self._hooks is not None
        _compat.pop_saved_tensors_hooks()
        try:
            return function(*args)
        finally:
            _compat.push_saved_tensors_hooks(*self._hooks)


class _Saved(torch.autograd.Function):
    """A node that saves a tensor and is no part of any backward."""

    @staticmethod
    def forward(ctx, dummy, tensor):
        ctx.save_for_backward(tensor)
        return torch.empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("hf_swiglu: backward went through a node that only saves a tensor")


def _random_state(device: torch.device) -> Callable[[], None]:
    """Sets the state of the random numbers to what it is now; checkpointing puts back the user's in the end."""
    library = torch if device.type == "cpu" else getattr(torch, device.type)
    return functools.partial(library.set_rng_state, library.get_rng_state())


def _requiring_gradient() -> Tensor:
    return torch.empty(0, requires_grad=True)


def _call(down: nn.Module, product: Tensor, holder: Tensor) -> Tensor:
    return recompute.call_with_packed(down, product, _Again(holder))


class _Again:
    """The product that a recomputation makes. Checkpointing hands it out once in each backward pass, and down may have
    saved it more than once."""

    def __init__(self, holder: Tensor):
        self._holder, self._uses = holder, 0
        self._task: int | None = None
        self._left = 0
        self._product: Tensor | None = None
        self._last: weakref.ref[Tensor] | None = None

    def one_more(self) -> Callable[[], Tensor]:
        """For one saved tensor: the function that computes it."""
        self._uses += 1
        return self._compute

    def _compute(self) -> Tensor:
        task = _compat.graph_task()
        product = self._product if task == self._task else None
        if product is None and task == self._task and self._last is not None:
            product = self._last()
        if product is None:
            (product,) = self._holder.grad_fn.saved_tensors  # type: ignore[union-attr]
            self._task, self._left, self._last = task, self._uses, weakref.ref(product)
        self._left -= 1
        self._product = product if self._left > 0 else None
        return product
