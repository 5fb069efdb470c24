"""The path of a call (kernel, plain formula, or a node of autograd's graph around a kernel) and memory for its result.

    plain formula     captured by torch.compile or a tracer, transformed, of an unusual layout or subclass, on a device
                      or of a dtype without a kernel, or so small that eager PyTorch is faster
    kernel            everything else that needs no gradient
    autograd          everything else that needs the gradient of all its inputs

Overhead matters for small calls: one test of a tensor takes a fiftieth of the time that eager PyTorch takes for a row.
Contiguous CPU tensors, the most frequent case, are therefore tested first and passed to the C kernel directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from hf_swiglu import _ops, autograd, backends, reference
from hf_swiglu.backends import KERNEL_DTYPES
from hf_swiglu.reference import LAYOUTS, SILU, GLUParams
from hf_swiglu.torch_modes import is_captured, is_intercepted, is_tracing, is_transformed

# Up to this many elements plain PyTorch is faster, or no slower: with a backward, where an autograd.Function adds up to
# 10 us to eager's 33; and without one where the tensors are not contiguous. Eager's time over the kernel's, float32 and
# bfloat16, 2 threads: with a backward 0.95 to 1.03 and 1.03 to 1.20 at 12,288 elements, 1.02 to 1.08 and
# 1.13 to 1.30 at 16,384 (EPYC 9004, packed and separate); without one 0.94 and 1.28 at 8,192, 1.16 and 1.56 at 12,288
# (EPYC 7003).
SMALLEST_KERNEL = {"cpu": 10_000, "cuda": 0, "xpu": 0, "meta": 0}
SMALLEST_DIFFERENTIATED = {"cpu": 12_288, "cuda": 0, "xpu": 0, "meta": 0}

# Validates the arguments of a public function and returns them in one dtype.
Check = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def swiglu(gate: Tensor, up: Tensor | None, params: GLUParams = SILU, check: Check | None = None) -> Tensor:
    """The product of any member of the family; without `up`, the activation alone.

    `check` runs where the C kernel has rejected the tensors; it accepts only tensors of one shape, dtype and device.
    Without `check`, tensors that no kernel accepts, broadcasting included, are passed to plain PyTorch and its errors.
    """
    if type(gate) is Tensor and (up is None or type(up) is Tensor) and not is_dynamo_compiling():
        if is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
            result = _contiguous_differentiated(gate, up, params)
        else:
            result = _contiguous(gate, up, params, None)
        if result is not None:
            return result
    if check is not None:
        gate, up = check(gate, up)
    differentiated = is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    if is_captured() or not _has_kernel(gate, gate.numel(), differentiated) or not _are_alike(gate, up):
        return reference.swiglu_fwd(gate, up, params)
    if not differentiated:
        return autograd.new_product(gate, up, params)
    if gate.requires_grad and (up is None or up.requires_grad):
        return autograd.SwiGLUFunction.apply(gate, up, params)
    # With one of the two frozen, eager autograd saves only what the other's gradient needs.
    return reference.swiglu_fwd(gate, up, params)


def swiglu_packed(gate_up: Tensor, params: GLUParams = SILU, layout: str = "gate_up") -> Tensor:
    """`swiglu` of a packed tensor [..., 2 * I]: backward keeps one tensor and writes one."""
    differentiated = is_grad_enabled() and gate_up.requires_grad
    if not differentiated and layout == "gate_up" and type(gate_up) is Tensor and not is_dynamo_compiling():
        result = _contiguous_packed(gate_up, params)
        if result is not None:
            return result
    is_served = differentiated and not is_captured() and _has_kernel(gate_up, gate_up.numel() // 2, True)
    if is_served and _are_alike(gate_up, None):
        return autograd.PackedSwiGLUFunction.apply(gate_up, params, layout)
    gate, up = LAYOUTS[layout](gate_up)
    return reference.swiglu_fwd(gate, up, params) if differentiated else swiglu(gate, up, params)


def swiglu_inplace(gate: Tensor, up: Tensor, params: GLUParams = SILU) -> Tensor:
    """`swiglu` without gradients, written over `gate`: only for a caller that owns `gate` alone."""
    if type(gate) is Tensor and type(up) is Tensor and not is_dynamo_compiling():
        result = _contiguous(gate, up, params, gate)
        if result is not None:
            return result
    if is_captured() or not _are_alike(gate, up):
        return reference.swiglu_fwd(gate, up, params)
    if not _has_kernel(gate, gate.numel(), False):
        return reference.swiglu_fwd_inplace(gate, up, params)
    _ops.launch_fwd(gate, up, gate, params)
    return gate


def _contiguous(gate: Tensor, up: Tensor | None, params: GLUParams, out: Tensor | None) -> Tensor | None:
    """The product by the C kernel, in `out` or in new memory; None where the kernel rejects the tensors."""
    kernel = _c_kernel("swiglu_fwd")
    if kernel is None or not _is_plain(gate) or (up is not None and up.is_neg()):
        return None
    if out is None:
        out = torch.empty_like(gate)
    # The kernel itself compares up with gate.
    return out if kernel(get_num_threads(), *params.scalars(), gate, up, out) else None


def _contiguous_differentiated(gate: Tensor, up: Tensor | None, params: GLUParams) -> Tensor | None:
    if not gate.is_cpu or (up is not None and (up.dtype is not gate.dtype or up.shape != gate.shape)) or is_tracing():
        return None
    if gate.numel() <= SMALLEST_DIFFERENTIATED["cpu"]:
        return reference.swiglu_fwd(gate, up, params) if gate.is_floating_point() else None
    if _c_kernel("swiglu_bwd") is None or not _is_plain(gate) or not gate.requires_grad:
        return None
    if up is not None and not (up.requires_grad and up.is_cpu and up.is_contiguous() and not up.is_neg()):
        return None
    return autograd.SwiGLUFunction.apply(gate, up, params)


def _contiguous_packed(gate_up: Tensor, params: GLUParams) -> Tensor | None:
    """`_contiguous` of a packed tensor, without `chunk`, which takes two fifths of eager's time for one row."""
    kernel = _c_kernel("swiglu_packed_fwd")
    if kernel is None or not _is_plain(gate_up) or gate_up.dim() == 0:
        return None
    *lead, width = gate_up.shape
    out = gate_up.new_empty((*lead, width // 2))
    return out if kernel(get_num_threads(), *params.scalars(), gate_up, out) else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the memory of this tensor directly: a contiguous CPU tensor, and no interception."""
    return (
        tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.dtype in KERNEL_DTYPES
        and not tensor.is_neg()
        and not is_intercepted()
    )


@functools.cache
def _c_kernel(name: str) -> Callable[..., bool] | None:
    """The C kernel that reads contiguous tensors and returns whether it accepted them; None without one."""
    return None if backends.unavailable("cpu") else backends.cpu_kernels().tensor_kernel(name)


def _has_kernel(tensor: Tensor, elements: int, differentiated: bool) -> bool:
    """Whether there is a kernel for this device and dtype that is no slower than eager PyTorch for so many elements."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    smallest = (SMALLEST_DIFFERENTIATED if differentiated else SMALLEST_KERNEL).get(device)
    return (
        smallest is not None
        and elements > smallest
        and tensor.dtype in KERNEL_DTYPES
        and backends.unavailable(device) is None
    )


def _are_alike(gate: Tensor, up: Tensor | None) -> bool:
    """Whether a kernel may read these and write one over the other: ordinary, untransformed tensors of one shape, dtype
    and device."""
    if is_transformed() or not _is_ordinary(gate):
        return False
    return up is None or (
        _is_ordinary(up) and up.dtype == gate.dtype and up.shape == gate.shape and up.device == gate.device
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        # Packed halves have columns at stride 1, interleaved ones at 2. For a transposed [1024, 4096] eager is faster:
        # 6.6 ms against 45 ms and more (float32, EPYC 7003).
        and (tensor.is_contiguous() or tensor.stride(-1) in (1, 2))
    )
