"""The operators on CPU tensors: from tensors to the addresses and strides that the C kernel takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

from hf_swiglu.backends import _cpu_kernels  # type: ignore[attr-defined]
from hf_swiglu.backends.rows import common_rows
from hf_swiglu.reference import clamp_passes_at_limit

# The order of the enumeration in csrc/kernels.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Columns farther apart than a cache line's worth are copied first, which PyTorch does in blocks: a transposed
# [1024, 4096] takes 173 ms in strides and 125 ms in copies (float32, one thread of a busy EPYC 7003).
_LARGEST_COLUMN_STRIDE = 16

_cpu_kernels.set_passes_at_limit(clamp_passes_at_limit())

instruction_set: Callable[[], str] = _cpu_kernels.instruction_set

# Whether C may look at tensors itself, which newer versions of PyTorch offer; Python does it otherwise.
_READS_TENSORS = hasattr(Tensor, "__dlpack_c_exchange_api__") and _cpu_kernels.use_exchange_table(
    Tensor, Tensor.__dlpack_c_exchange_api__
)


def tensor_kernel(name: str) -> Callable[..., bool] | None:
    """The C function `name`, if it can be handed tensors."""
    return getattr(_cpu_kernels, name) if _READS_TENSORS else None


def product(gate: Tensor, up: Tensor | None, out: Tensor, power: int = 1, limits: list[float] | None = None) -> None:
    """Writes the product of `reference.Gating(power, *limits)` into `out`, which may be one of the inputs."""
    _check("product", (gate, up, out))
    run("product", (gate, up), (out,), power, limits)


def product_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    power: int = 1,
    limits: list[float] | None = None,
) -> None:
    """Writes the gradients of `product` with respect to `gate` and, where there is one, to `up`."""
    if (up is None) is not (grad_up is None):
        raise ValueError("product_backward: up and grad_up belong together; give both of them or neither")
    _check("product_backward", (grad, gate, up, grad_gate, grad_up))
    run("product_backward", (grad, gate, up), (grad_gate, grad_up), power, limits)


def run(function: str, inputs: tuple, outputs: tuple, power: int = 1, limits: list[float] | None = None) -> None:
    """One of the two operators, on tensors that are known to go together."""
    kernel = _cpu_kernels.product if function == "product" else _cpu_kernels.product_backward
    if not kernel(get_num_threads(), power, limits, *inputs, *outputs):
        _run_rows(function, inputs, outputs, power, limits)


def _run_rows(function: str, inputs: tuple, outputs: tuple, power: int, limits: list[float] | None) -> None:
    tensors = [tensor for tensor in inputs + outputs if tensor is not None]
    rows = common_rows(tensors[0].shape, *(tensor.stride() for tensor in tensors))
    if rows is None or any(row.column_stride > _LARGEST_COLUMN_STRIDE for row in rows):
        return _run_copies(function, inputs, outputs, power, limits)
    cut = iter(rows)
    strides: list[int] = []
    addresses = []
    for tensor in inputs + outputs:
        strides += (0, 0) if tensor is None else next(cut)[2:]
        addresses.append(0 if tensor is None else _address(tensor))
    kernel = getattr(_cpu_kernels, f"{function}_rows")
    code = _DTYPES[tensors[0].dtype]
    kernel(get_num_threads(), power, limits, code, rows[0].rows, rows[0].columns, tuple(strides), *addresses)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise RuntimeError(f"hf_swiglu: a tensor of shape {tuple(tensor.shape)} has no memory; was its storage freed?")
    return address


def _run_copies(function: str, inputs: tuple, outputs: tuple, power: int, limits: list[float] | None) -> None:
    """For tensors that do not lie in rows: contiguous copies of the inputs, results copied to where they belong."""
    inputs = tuple(tensor if tensor is None else tensor.contiguous() for tensor in inputs)
    results = tuple(
        tensor if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in outputs
    )
    run(function, inputs, results, power, limits)
    for tensor, result in zip(outputs, results):
        if tensor is not None:
            tensor.copy_(result)


def _check(function: str, operands: tuple[Tensor | None, ...]) -> None:
    tensors = [tensor for tensor in operands if tensor is not None]
    first = tensors[0]
    alike = all(tensor.shape == first.shape and tensor.dtype is first.dtype for tensor in tensors)
    if not alike or first.dtype not in _DTYPES:
        given = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(
            f"{function}: the CPU kernel takes tensors of one shape and of one dtype out of float32, bfloat16 and "
            f"float16; got {given}"
        )
