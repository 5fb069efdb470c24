"""The operators on CPU tensors: from tensors to the addresses and strides that the C kernel takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

from hf_swiglu import _compat
from hf_swiglu.backends import _cpu_kernels  # type: ignore[attr-defined]
from hf_swiglu.backends.layout import common_layout
from hf_swiglu.reference import GLUParams, clamp_passes_at_limit

# The order of the enumeration in csrc/kernels.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Columns farther apart than a cache line's worth are copied first, which PyTorch does in blocks: a transposed
# [1024, 4096] takes 173 ms in strides and 125 ms in copies (float32, one thread of a busy EPYC 7003).
_LARGEST_COLUMN_STRIDE = 16

_cpu_kernels.set_passes_at_limit(clamp_passes_at_limit())

instruction_set: Callable[[], str] = _cpu_kernels.instruction_set

# Whether C may look at tensors itself, which newer versions of PyTorch offer; Python does it otherwise.
_READS_TENSORS = _compat.exchange_api is not None and _cpu_kernels.use_exchange_table(Tensor, _compat.exchange_api)


def tensor_kernel(name: str) -> Callable[..., bool] | None:
    """The C function `name`, if it can be handed tensors."""
    names = {"swiglu_fwd": "product", "swiglu_bwd": "product_backward", "swiglu_packed_fwd": "packed_product"}
    return getattr(_cpu_kernels, names[name]) if _READS_TENSORS else None


def swiglu_fwd(gate: Tensor, up: Tensor | None, out: Tensor, params: GLUParams) -> None:
    """Write the product of `params` to `out`, which may be `gate` itself."""
    _launch("product", (gate, up), (out,), params)


def swiglu_bwd(
    grad_out: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, params: GLUParams
) -> None:
    """Write the gradients of `swiglu_fwd` to `grad_gate` and `grad_up`, given that of its output."""
    _launch("product_backward", (grad_out, gate, up), (grad_gate, grad_up), params)


def _launch(function: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    kernel = getattr(_cpu_kernels, function)
    if not kernel(get_num_threads(), *params.scalars(), *inputs, *outputs):
        _launch_strided(function, inputs, outputs, params)


def _launch_strided(function: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    tensors = [tensor for tensor in inputs + outputs if tensor is not None]
    rows = common_layout(tensors[0].shape, *(tensor.stride() for tensor in tensors))
    if rows is None or any(row.column_stride > _LARGEST_COLUMN_STRIDE for row in rows):
        return _launch_on_copies(function, inputs, outputs, params)
    cut = iter(rows)
    strides: list[int] = []
    addresses = []
    for tensor in inputs + outputs:
        strides += (0, 0) if tensor is None else next(cut)[2:]
        addresses.append(0 if tensor is None else _address(tensor))
    kernel = getattr(_cpu_kernels, f"{function}_rows")
    code = _DTYPES[tensors[0].dtype]
    kernel(get_num_threads(), *params.scalars(), code, rows[0].rows, rows[0].columns, tuple(strides), *addresses)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise RuntimeError(f"hf_swiglu: a tensor of shape {tuple(tensor.shape)} has no memory; was its storage freed?")
    return address


def _launch_on_copies(function: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    """For tensors that do not lie in rows: contiguous copies of the inputs, results copied to where they belong."""
    inputs = tuple(tensor if tensor is None else tensor.contiguous() for tensor in inputs)
    results = tuple(
        tensor if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in outputs
    )
    _launch(function, inputs, results, params)
    for tensor, result in zip(outputs, results):
        if tensor is not None:
            tensor.copy_(result)
