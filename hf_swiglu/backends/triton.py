"""The GPU kernels: one Triton source for CUDA, ROCm and XPU.

An operand is rows of columns, read and written without a copy. One program computes one tile of it, in float32, and
rounds to a 16-bit dtype wherever PyTorch's own operators do. The kernels are memory-bound: every access is 16 bytes
wide where the layout allows it, several are in flight at a time, and no element is read twice.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_swiglu.backends.layout import common_layout
from hf_swiglu.reference import SILU, SWIGLU, GLUParams, clamp_passes_at_limit

# 16 elements for each of the 128 threads of a Triton program: two 16-byte loads per operand in bfloat16, four in
# float32. In bfloat16 that takes 32 registers forward and 56 backward (sm_90), so 64 and 36 of a multiprocessor's
# 64 warps fit, with over 100 KiB of loads in flight.
TILE = tl.constexpr(2048)
INFINITY = tl.constexpr(math.inf)
PASSES_AT_LIMIT = tl.constexpr(clamp_passes_at_limit())


@triton.jit
def _tile(rows, columns, tile_columns: tl.constexpr, even: tl.constexpr):
    """This program's rows [R, 1], columns [1, C] and mask, with R * C = TILE. `even`: every tile is full.

    The indices are 64-bit, which costs an instruction or two per 16-byte access: only its address is computed.
    """
    tile_rows: tl.constexpr = TILE // tile_columns
    across = (columns - 1) // tile_columns + 1
    # One grid dimension: the other two end at 65535.
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    column = (program % across).to(tl.int64) * tile_columns + tl.arange(0, tile_columns)[None, :]
    inside = (row < rows) & (column < columns)
    mask = tl.full((tile_rows, tile_columns), True, tl.int1) if even else inside
    return row, column, mask


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """To the dtype and back, to nearest even: PyTorch rounds after each operation."""
    return x if dtype == tl.float32 else x.to(dtype).to(tl.float32)


@triton.jit
def _minimum(value, limit: tl.constexpr):
    """min(value, limit), NaN kept as in torch.clamp."""
    return value if limit == INFINITY else tl.where(value > limit, limit, value)


@triton.jit
def _passes(value, limit: tl.constexpr):
    """Where torch.clamp(max=limit) passes the gradient: below the limit, not for NaN, at it if this PyTorch does."""
    return value <= limit if PASSES_AT_LIMIT else value < limit


@triton.jit
def _clamped_up(up, params: tl.constexpr, dtype: tl.constexpr):
    """clamp(up, -up_limit, up_limit) + up_offset"""
    if params.up_limit != INFINITY:
        up = tl.where(up < -params.up_limit, -params.up_limit, _minimum(up, params.up_limit))
    return _rounded(up + params.up_offset, dtype) if params.up_offset != 0 else up


@triton.jit
def _swish(g, params: tl.constexpr, dtype: tl.constexpr):
    """(g * sigmoid(alpha g), sigmoid(alpha g), exp(-alpha g)); one PyTorch operator where alpha is 1, else three.

    Triton's plain division has an error of up to two units in the last place, which would change bits of the result.
    """
    if params.alpha == 1 or dtype == tl.float32:
        e = tl.exp(-params.alpha * g)
        return _rounded(tl.div_rn(g, 1 + e), dtype), tl.div_rn(1.0, 1 + e), e
    e = tl.exp(-_rounded(g * params.alpha, dtype))
    sigma = _rounded(tl.div_rn(1.0, 1 + e), dtype)
    return _rounded(g * sigma, dtype), sigma, e


@triton.jit
def _fwd_strided(
    gate, up, out, gate_row, gate_column, up_row, up_column, out_row, out_column, rows, columns,
    params: tl.constexpr, tile_columns: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """out = a * u of `reference.GLUParams`; `*_row` and `*_column` are strides."""
    dtype: tl.constexpr = out.dtype.element_ty
    row, column, mask = _tile(rows, columns, tile_columns, even)
    g = tl.load(gate + row * gate_row + column * gate_column, mask=mask).to(tl.float32)
    if up is not None:
        u = tl.load(up + row * up_row + column * up_column, mask=mask).to(tl.float32)

    g = _minimum(g, params.gate_limit)
    result, _, _ = _swish(g, params, dtype)
    if params.power == 2:
        result = _rounded(g * result, dtype)
    result = _minimum(result, params.act_limit)
    if up is not None:
        result *= _clamped_up(u, params, dtype)
    tl.store(out + row * out_row + column * out_column, result, mask=mask)


@triton.jit
def _added(sum, x, dtype: tl.constexpr):
    """`sum + x`, or `x` without a sum: adding 0 would lose the sign of -0."""
    return x if sum is None else _rounded(sum + x, dtype)


@triton.jit
def _swish_gradient(grad, g, swish, sigma, e, sum, params: tl.constexpr, dtype: tl.constexpr):
    """`sum` plus the gradient of swish, from the gradient of its result, in PyTorch's order of operators in 16 bits."""
    if dtype == tl.float32:
        # 1 - sigma, without the cancellation that is most of PyTorch's own error in float32.
        complement = tl.where(e > 1, 1 - sigma, e * sigma)
        return _added(sum, grad * sigma * (1 + params.alpha * g * complement), dtype)
    if params.alpha == 1:
        return _added(sum, _rounded(grad * sigma * (1 + g * (1 - sigma)), dtype), dtype)
    inner = _rounded(_rounded(grad * g, dtype) * (1 - sigma) * sigma, dtype)
    sum = _added(sum, _rounded(grad * sigma, dtype), dtype)
    return _added(sum, _rounded(inner * params.alpha, dtype), dtype)


@triton.jit
def _bwd_strided(
    grad, gate, up, grad_gate, grad_up,
    grad_row, grad_column, gate_row, gate_column, up_row, up_column,
    grad_gate_row, grad_gate_column, grad_up_row, grad_up_column, rows, columns,
    params: tl.constexpr, tile_columns: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """grad_gate = grad * u * a' and grad_up = grad * a; `*_row` and `*_column` are strides.

    s = sigmoid(alpha g)    swish = g s    swish' = s (1 + alpha g (1 - s))
    power 1: a = swish, a' = swish'        power 2: a = g swish, a' = swish + g swish'
    """
    dtype: tl.constexpr = grad_gate.dtype.element_ty
    row, column, mask = _tile(rows, columns, tile_columns, even)
    grad_a = tl.load(grad + row * grad_row + column * grad_column, mask=mask).to(tl.float32)
    unlimited = tl.load(gate + row * gate_row + column * gate_column, mask=mask).to(tl.float32)
    if up is not None:
        u = tl.load(up + row * up_row + column * up_column, mask=mask).to(tl.float32)

    g = _minimum(unlimited, params.gate_limit)
    swish, sigma, e = _swish(g, params, dtype)
    a = _rounded(g * swish, dtype) if params.power == 2 else swish

    if up is not None:
        grad_u = grad_a * _minimum(a, params.act_limit)
        if params.up_limit != INFINITY:
            grad_u = tl.where(_passes(tl.abs(u), params.up_limit), grad_u, 0.0)
        tl.store(grad_up + row * grad_up_row + column * grad_up_column, grad_u, mask=mask)
        grad_a = _rounded(grad_a * _clamped_up(u, params, dtype), dtype)
    if params.act_limit != INFINITY:
        grad_a = tl.where(_passes(a, params.act_limit), grad_a, 0.0)
    # Summed in PyTorch's order, so that infinities and signed zeros are PyTorch's.
    if params.power == 2:
        sum = _rounded(grad_a * swish, dtype)
        grad_g = _swish_gradient(_rounded(grad_a * g, dtype), g, swish, sigma, e, sum, params, dtype)
    else:
        grad_g = _swish_gradient(grad_a, g, swish, sigma, e, None, params, dtype)
    if params.gate_limit != INFINITY:
        grad_g = tl.where(_passes(unlimited, params.gate_limit), grad_g, 0.0)
    tl.store(grad_gate + row * grad_gate_row + column * grad_gate_column, grad_g, mask=mask)


# Contiguous operands are one row of known strides. Triton inspects every argument of every launch: without the strides
# that takes 3.2 us instead of 6.2 forward, and 5 instead of 9 backward (Triton 3.9, EPYC 7003).
@triton.jit
def _fwd_flat(gate, up, out, count, params: tl.constexpr, even: tl.constexpr):
    _fwd_strided(gate, up, out, 0, 1, 0, 1, 0, 1, 1, count, params, TILE, even)


@triton.jit
def _bwd_flat(grad, gate, up, grad_gate, grad_up, count, params: tl.constexpr, even: tl.constexpr):
    _bwd_strided(
        grad, gate, up, grad_gate, grad_up, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, count, params, TILE, even
    )  # fmt: skip


def swiglu_fwd(gate: Tensor, up: Tensor | None, out: Tensor, params: GLUParams) -> None:
    """Write the product of `params` to `out`, which may be `gate` itself."""
    _launch_for_layout(_fwd_flat, _fwd_strided, (gate, up), (out,), _in_dtype(params, gate.dtype))


def swiglu_bwd(
    grad_out: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, params: GLUParams
) -> None:
    """Write the gradients of `swiglu_fwd` to `grad_gate` and `grad_up`, from the gradient of its output."""
    params = _in_dtype(params, gate.dtype)
    _launch_for_layout(_bwd_flat, _bwd_strided, (grad_out, gate, up), (grad_gate, grad_up), params)


@functools.lru_cache
def _in_dtype(params: GLUParams, dtype: torch.dtype) -> GLUParams:
    """The limits in the tensors' dtype, in which PyTorch's clamp compares."""
    if params in (SILU, SWIGLU):
        return params
    limits = torch.tensor([params.gate_limit, params.act_limit, params.up_limit], dtype=dtype).tolist()
    return params._replace(gate_limit=limits[0], act_limit=limits[1], up_limit=limits[2])


def _launch_for_layout(flat_kernel, rows_kernel, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    """Launch the kernel for the layout of the operands; all have one shape, absent ones are None."""
    operands = (*inputs, *outputs)
    present = [tensor for tensor in operands if tensor is not None]
    count = present[0].numel()
    if count == 0:
        return
    if all(tensor.is_contiguous() for tensor in present):
        _launch(flat_kernel, -(-count // TILE.value), operands, count, params, count % TILE.value == 0)
        return
    cuts = common_layout(present[0].shape, *(tensor.stride() for tensor in present))
    if cuts is None:
        _launch_on_copies(flat_kernel, rows_kernel, inputs, outputs, params)
        return
    rows, columns = cuts[0].rows, cuts[0].columns
    tile_columns = _tile_columns(columns)
    tile_rows = TILE.value // tile_columns
    programs = -(-rows // tile_rows) * -(-columns // tile_columns)
    even = rows % tile_rows == 0 and columns % tile_columns == 0
    remaining = iter(cuts)
    strides = [stride for tensor in operands for stride in ((0, 0) if tensor is None else next(remaining)[2:])]
    _launch(rows_kernel, programs, operands, *strides, rows, columns, params, tile_columns, even)


def _launch_on_copies(flat_kernel, rows_kernel, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    """`_launch_for_layout` for leading dimensions without a single stride, such as a transposed batch."""
    inputs = tuple(None if tensor is None else tensor.contiguous() for tensor in inputs)
    copies = tuple(
        None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in outputs
    )
    _launch_for_layout(flat_kernel, rows_kernel, inputs, copies, params)
    for tensor, copy in zip(outputs, copies, strict=True):
        if tensor is not None:
            tensor.copy_(copy)


@functools.lru_cache
def _tile_columns(columns: int) -> int:
    """The widest tile that leaves at most an eighth of its lanes idle: 2048 for 11008 columns, 512 for 1536."""
    for width in (2048, 1024, 512, 256, 128, 64, 32):
        if -(-columns // width) * width <= columns * 9 / 8:
            return width
    return 16


def _launch(kernel, programs: int, operands: tuple, *scalars) -> None:
    device = operands[0].device
    backend = getattr(torch, device.type)
    # Triton launches on the current device, which is the right one where there is only one.
    if backend.device_count() == 1:
        kernel[(programs,)](*operands, *scalars)
        return
    with backend.device(device):
        kernel[(programs,)](*operands, *scalars)
