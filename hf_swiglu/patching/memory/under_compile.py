"""keep=0 to 2 under torch.compile: the class's own forward, with a policy for the tensors that the partitioner keeps.

Inductor's partitioner keeps gate, up and the product. It applies PyTorch's checkpointing: under a policy that saves the
results of matrix products, gate and up are kept; without a policy, only the module's input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_swiglu._compat import is_exporting
from hf_swiglu.patching.memory.settings import Memory

_aten = torch.ops.aten
MATRIX_PRODUCTS = (
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.linear.default,
    _aten._scaled_mm.default,
)  # fmt: skip


def save_matrix_products(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """The policy of keep=2."""
    return CheckpointPolicy.MUST_SAVE if operator in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keeps_two = functools.partial(create_selective_checkpoint_contexts, save_matrix_products)


def caller(memory: Memory) -> Callable[..., Any]:
    """The function that calls the class's own forward in place of the rewritten one."""
    if not memory.repeats or memory.keep == 3:
        return call
    return _call_keeping_two if memory.keep == 2 else _call_keeping_none


def call(forward, *args, **kwargs):
    """`forward(*args, **kwargs)`"""
    return forward(*args, **kwargs)


def _call_keeping_two(forward, *args, **kwargs):
    if not is_dynamo_compiling() or not torch.is_grad_enabled() or is_exporting():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_keeps_two, **kwargs)


def _call_keeping_none(forward, *args, **kwargs):
    if not is_dynamo_compiling() or not torch.is_grad_enabled() or is_exporting():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
