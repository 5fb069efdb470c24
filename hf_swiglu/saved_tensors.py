"""Memory for the gradients that a node computes: that of its saved tensors, if nothing else references them.

In a node's backward, three counts are known for an unpacked tensor that only the graph references:

    (Python references to the tensor, references to its storage, C++ references to the tensor)

A hook that kept the tensor, a view of it or `detach()` raises one of them, and so does another node that saved it. With
saved-tensor hooks, those of checkpointing included, the counts differ, and new memory is allocated.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from hf_swiglu import _compat
from hf_swiglu.new_thread import in_new_thread

# For fewer elements the test takes longer than an allocation.
SMALLEST_WRITTEN_OVER = 4096


def gradient_outputs(saved: tuple[Tensor, ...]) -> list[Tensor]:
    """For each unpacked tensor of a node, the tensor for its gradient: over it if only the graph owns it, else new.

    The version counter of an overwritten tensor is incremented, so that a second backward raises PyTorch's error.
    """
    if not _compat.can_prove_ownership or _compat.keeps_graph() or _compat.is_any_mode_active():
        return [torch.empty_like(tensor) for tensor in saved]
    # All of them are tested before the first is reused.
    is_owned = [_is_solely_owned(saved, at) for at in range(len(saved))]
    return [_overwritable(saved[at]) if is_owned[at] else torch.empty_like(saved[at]) for at in range(len(saved))]


def _is_solely_owned(saved: tuple[Tensor, ...], at: int) -> bool:
    return (
        saved[at].numel() > SMALLEST_WRITTEN_OVER
        and not saved[at].is_leaf
        and saved[at].is_contiguous()
        and _counts(saved, at) == _sole_owner_counts()
    )


def _overwritable(tensor: Tensor) -> Tensor:
    assert _compat.increment_version is not None
    _compat.increment_version(tensor)
    return tensor.detach()


def _counts(saved: tuple[Tensor, ...], at: int) -> tuple[int, int, int]:
    return sys.getrefcount(saved[at]), *_compat.use_counts(saved[at])


@functools.cache
def _sole_owner_counts() -> tuple[int, int, int]:
    """The counts of a tensor that a node has saved and nothing else references, measured once."""
    measured: list[tuple[int, int, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.save_for_backward(tensor)
            return tensor.new_zeros(1)

        @staticmethod
        def backward(ctx, grad):
            saved = tuple([tensor for tensor in ctx.saved_tensors])  # noqa: C416
            measured.append(_counts(saved, 0))
            return grad

    def measure() -> None:
        Probe.apply(torch.zeros(1, requires_grad=True) * 1).sum().backward()

    # Also without the caller's running backward.
    in_new_thread(measure)
    return measured[0]
