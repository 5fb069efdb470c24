"""Gradients in the memory of the tensors that a node has saved, where nothing else needs them any more.

In a node's backward, (references to an unpacked tensor, users of its storage, users of the tensor in C++) are three
known numbers while the graph alone holds it. A hook that kept the tensor, a view of it or `detach()` raises one of
them; so does another node that has saved it. Hooks on saved tensors, those of checkpointing among them, lead to other
numbers, and so to new memory.
"""

from __future__ import annotations

import functools
import sys
import threading

import torch
from torch import Tensor

from hf_swiglu import _compat

# To find out takes longer than to allocate less.
SMALLEST_WRITTEN_OVER = 4096


def places(saved: tuple[Tensor, ...]) -> list[Tensor]:
    """For the gradient of each of a node's unpacked tensors: its own memory where that is free, new memory elsewhere.

    The version counter moves, so that a second backward raises PyTorch's error.
    """
    if not _compat.can_prove_ownership or _compat.keeps_graph() or _compat.is_any_mode_active():
        return [torch.empty_like(tensor) for tensor in saved]
    # All of them are asked about before the first is given away.
    is_free = [_is_free(saved, at) for at in range(len(saved))]
    return [_given_away(saved[at]) if is_free[at] else torch.empty_like(saved[at]) for at in range(len(saved))]


def _is_free(saved: tuple[Tensor, ...], at: int) -> bool:
    return (
        saved[at].numel() > SMALLEST_WRITTEN_OVER
        and not saved[at].is_leaf
        and saved[at].is_contiguous()
        and _counts(saved, at) == _counts_of_the_graphs_own()
    )


def _given_away(tensor: Tensor) -> Tensor:
    assert _compat.increment_version is not None
    _compat.increment_version(tensor)
    return tensor.detach()


def _counts(saved: tuple[Tensor, ...], at: int) -> tuple[int, int, int]:
    return sys.getrefcount(saved[at]), *_compat.use_counts(saved[at])


@functools.cache
def _counts_of_the_graphs_own() -> tuple[int, int, int]:
    """The numbers of a tensor that a node has saved and nothing else holds, measured once."""
    seen: list[tuple[int, int, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.save_for_backward(tensor)
            return tensor.new_zeros(1)

        @staticmethod
        def backward(ctx, grad):
            saved = tuple([tensor for tensor in ctx.saved_tensors])  # noqa: C416
            seen.append(_counts(saved, 0))
            return grad

    def measure() -> None:
        Probe.apply(torch.zeros(1, requires_grad=True) * 1).sum().backward()

    # A thread of its own has no hooks, modes or autocast of the caller's, and is in no backward.
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return seen[0]
