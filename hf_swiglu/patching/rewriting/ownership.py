"""Whether only one expression references a tensor's memory, proved from reference counts just before it is overwritten.

    (Python references to the tensor, references to its storage, C++ references to the tensor)

have known values for the result of an expression, and other known values for a tensor with one local name. A hook, a
mode or a wrapper that kept the tensor raises the first count, one that kept a view, `detach()` or an array the second,
and C++ code that kept the tensor the third.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from hf_swiglu import _compat
from hf_swiglu.torch_modes import is_transformed


def counts(tensor: Tensor) -> tuple[int, int, int]:
    """The three counts, for a caller that received `tensor` as an argument."""
    return sys.getrefcount(tensor), *_compat.use_counts(tensor)


@functools.cache
def owned_counts(has_name: bool) -> tuple[int, int, int]:
    """The counts of a tensor that is the result of an expression, or that has one local name in the caller.

    Measured once, because they differ between Python releases.
    """
    if has_name:
        tensor = torch.empty(0)
        return _counts_of_argument(tensor)
    return _counts_of_argument(torch.empty(0))


def _counts_of_argument(tensor: Tensor) -> tuple[int, int, int]:
    return counts(tensor)


def may_be_written(tensor: Tensor, *others: Tensor) -> bool:
    """Whether PyTorch allows a result of these tensors in the memory of `tensor`, whose elements do not overlap."""
    return (
        _compat.can_prove_ownership
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in (tensor, *others)))
        # Sparse and wrapped tensors have no storage whose references can be counted.
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not is_transformed()
        and tensor.is_contiguous()
        and not _compat.is_any_mode_active()
    )


def mark_written(tensor: Tensor) -> None:
    """Increment the version counter, by which autograd detects a write."""
    if not tensor.is_inference():
        assert _compat.increment_version is not None
        _compat.increment_version(tensor)
