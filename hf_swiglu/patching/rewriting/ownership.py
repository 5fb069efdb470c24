"""Whether a tensor's memory belongs to one expression alone, proved at the moment it is to be written over.

    (references to the tensor object, users of its storage, users of the tensor in C++)

are three known numbers while an expression has just made the tensor, and others while one local name holds it. A hook,
a mode or a wrapper that kept the tensor raises the first number, one that kept a view, `detach()` or an array the
second, and code in C++ that kept the tensor the third.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from hf_swiglu import _compat
from hf_swiglu.interception import is_transformed


def counts(tensor: Tensor) -> tuple[int, int, int]:
    """The numbers, as they are for a caller that was handed `tensor` as an argument."""
    return sys.getrefcount(tensor), *_compat.use_counts(tensor)


@functools.cache
def owned_counts(has_name: bool) -> tuple[int, int, int]:
    """The numbers of a tensor that an expression has just made, or that one local name of the caller holds.

    Measured once, because Python releases differ in what they count.
    """
    if has_name:
        tensor = torch.empty(0)
        return _handed_on(tensor)
    return _handed_on(torch.empty(0))


def _handed_on(tensor: Tensor) -> tuple[int, int, int]:
    return counts(tensor)


def may_be_written(tensor: Tensor, *others: Tensor) -> bool:
    """Whether PyTorch would allow a result of these in the memory of `tensor`, each element in a place of its own."""
    return (
        _compat.can_prove_ownership
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in (tensor, *others)))
        # Neither sparse nor wrapped tensors have a storage to ask about.
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not is_transformed()
        and tensor.is_contiguous()
        and not _compat.is_any_mode_active()
    )


def mark_written(tensor: Tensor) -> None:
    """Move the version counter, by which autograd notices a write."""
    if not tensor.is_inference():
        assert _compat.increment_version is not None
        _compat.increment_version(tensor)
