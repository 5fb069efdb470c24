"""keep=0 and keep=1: backward computes the part of the forward before the down projection again, once for all uses.

A module's forward runs under PyTorch's non-reentrant checkpointing, which restores random numbers and autocast and
nests inside other checkpointing. Checkpointing alone would call the down projection again, whose output backward never
needs. The down projection is therefore called outside of checkpointing's hooks: its saved tensors stay in the graph as
without checkpointing, except the product, which is packed as a result of the recomputation, and is the last tensor that
the recomputation has to compute. With keep=1 the first projection is called outside of the hooks too, and its output is
kept.
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
from hf_swiglu.patching.memory import dropout_projections, recompute

_state = threading.local()


def run(forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`forward(*args)`, computed again in backward up to its call of `project`."""
    return checkpoint(_Region(forward), *args, use_reentrant=False)


def project(down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """`down(product)`: rewritten forwards call this for the projection that takes the product."""
    region = getattr(_state, "region", None)
    return recompute.project(down, product) if region is None else region.project(down, product)


def keep_output(projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`projection(x)`: rewritten forwards of keep=1 call this for the projection whose output is kept."""
    region = getattr(_state, "region", None)
    return projection(x) if region is None else region.keep_output(projection, x)


class _Region:
    """One call of a forward, and its recomputations."""

    def __init__(self, forward: Callable[..., Tensor]):
        self._forward = forward
        self._has_run = self._is_recomputing = False
        # For each kept output: a tensor whose node has saved it, whether the output requires a gradient, and a function
        # that sets the random state to that after the call, where dropout drew random numbers.
        self._kept: list[tuple[Tensor, bool, Callable[[], None] | None] | None] = []
        self._at = 0
        # For each call of a down projection, whether it is left out of the recomputation.
        self._is_left_out: list[bool] = []
        self._calls = 0
        # Checkpointing's hooks, while the forward runs.
        self._hooks: tuple[Callable, Callable] | None = None

    def __call__(self, *args: Tensor) -> Tensor:
        self._is_recomputing, self._has_run, self._at, self._calls = self._has_run, True, 0, 0
        before = getattr(_state, "region", None)
        # Twice, here and below: an interrupt may come in the inner `finally`, and a region that stays would fail later
        # calls.
        try:
            try:
                _state.region, self._hooks = self, _compat.saved_tensors_default_hooks()
                return self._forward(*args)
            finally:
                self._end(before)
        finally:
            self._end(before)

    def _end(self, before: _Region | None) -> None:
        # The hooks hold the checkpoint, which holds this object.
        _state.region, self._hooks = before, None

    def project(self, down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
        if not self._is_recomputing:
            self._is_left_out.append(self._can_be_left_out(down, product))
        is_left_out = self._is_left_out[self._calls]
        self._calls += 1
        if not is_left_out:
            return down(product)
        holder = _Saved.apply(_requiring_gradient(), product)
        # A recomputation reaches this line only if code after the down projection has saved a tensor as well.
        return (
            self._with_outer_hooks(down, product)
            if self._is_recomputing
            else self._with_outer_hooks(_call, down, product, holder)
        )

    def _can_be_left_out(self, down: Callable[[Tensor], Tensor], product: Tensor) -> bool:
        return (
            isinstance(down, nn.Module)
            and type(product) is Tensor
            and product.numel() > 0
            and self._is_innermost()
            and recompute.never_writes_input(down)
        )

    def keep_output(self, projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._is_recomputing:
            entry = self._kept[self._at]
            self._at += 1
            if entry is None:
                return projection(x)
            holder, requires_grad, set_random_state = entry
            if set_random_state is not None:
                set_random_state()
            (output,) = holder.grad_fn.saved_tensors  # type: ignore[union-attr]
            return output.detach().requires_grad_(requires_grad)
        if not self._is_innermost() or not isinstance(projection, nn.Module):
            self._kept.append(None)
            return projection(x)
        output = self._with_outer_hooks(projection, x)
        holder = self._with_outer_hooks(_Saved.apply, _requiring_gradient(), output)
        set_random_state = _random_state(output.device) if dropout_projections.drops(projection) else None
        self._kept.append((holder, output.requires_grad, set_random_state))
        return output

    def _is_innermost(self) -> bool:
        """Whether the innermost hooks are checkpointing's, and not ones that the forward has set."""
        hooks = _compat.saved_tensors_default_hooks()
        return self._hooks is not None and hooks is not None and hooks[0] is self._hooks[0]

    def _with_outer_hooks(self, function: Callable, *args: Any) -> Any:
        """`function(*args)` with the hooks that are active outside this region."""
        try:
            try:
                _compat.pop_saved_tensors_hooks()
                return function(*args)
            finally:
                self._resume_hooks()
        finally:
            self._resume_hooks()

    def _resume_hooks(self) -> None:
        if not self._is_innermost():
            assert self._hooks is not None
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
    """A function that sets the random state to the present one; checkpointing restores the user's at the end."""
    library = torch if device.type == "cpu" else getattr(torch, device.type)
    return functools.partial(library.set_rng_state, library.get_rng_state())


def _requiring_gradient() -> Tensor:
    return torch.empty(0, requires_grad=True)


def _call(down: nn.Module, product: Tensor, holder: Tensor) -> Tensor:
    return recompute.call_with_packed(down, product, _RegionProduct(holder))


class _RegionProduct:
    """A product that a recomputation computes. Checkpointing returns it once in each backward pass, and the down
    projection may have saved it more than once."""

    def __init__(self, holder: Tensor):
        self._holder, self._uses = holder, 0
        self._task: int | None = None
        self._remaining = 0
        self._product: Tensor | None = None
        self._last: weakref.ref[Tensor] | None = None

    def recomputation(self) -> Callable[[], Tensor]:
        """The function that computes the product for one saved tensor, and counts that tensor."""
        self._uses += 1
        return self._compute

    def _compute(self) -> Tensor:
        task = _compat.graph_task()
        product = self._product if task == self._task else None
        if product is None and task == self._task and self._last is not None:
            product = self._last()
        if product is None:
            (product,) = self._holder.grad_fn.saved_tensors  # type: ignore[union-attr]
            self._task, self._remaining, self._last = task, self._uses, weakref.ref(product)
        self._remaining -= 1
        self._product = product if self._remaining > 0 else None
        return product
