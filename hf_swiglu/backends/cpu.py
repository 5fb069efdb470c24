"""The operators on CPU tensors: from tensors to the addresses and strides that the C kernels take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

from hf_swiglu import _compat
from hf_swiglu.backends import _cpu_kernels  # type: ignore[attr-defined]
from hf_swiglu.backends.layout import common_layout, extent
from hf_swiglu.reference import GLUParams, clamp_passes_at_limit

# The order of the enumeration in csrc/kernels.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Columns more than a cache line apart are copied first, which PyTorch does in blocks: a transposed
# [1024, 4096] takes 173 ms in strides and 125 ms in copies (float32, one thread of a busy EPYC 7003).
_LARGEST_COLUMN_STRIDE = 16

_cpu_kernels.set_clamp_passes_at_limit(clamp_passes_at_limit())

cpu_capability: Callable[[], str] = _cpu_kernels.cpu_capability

# Whether the C kernels read contiguous tensors by DLPack; otherwise Python passes the tensors' addresses.
_READS_TENSORS: bool = _cpu_kernels.use_dlpack_exchange_api(Tensor, _compat.exchange_api)


def describe() -> str:
    """The instruction set and the threads of a launch."""
    count = get_num_threads()
    threads = (
        f"{count} thread{'' if count == 1 else 's'}"
        if _cpu_kernels.has_openmp
        else "1 thread: the compiler had no OpenMP"
    )
    return f"C kernel, {cpu_capability()}, {threads}"


def tensor_kernel(name: str) -> Callable[..., bool] | None:
    """The C function `name`; None where the C kernels do not read tensors."""
    return getattr(_cpu_kernels, name) if _READS_TENSORS else None


def swiglu_fwd(gate: Tensor, up: Tensor | None, out: Tensor, params: GLUParams) -> None:
    """Write the product of `params` to `out`, which may be `gate` itself."""
    _launch("swiglu_fwd", (gate, up), (out,), params)


def swiglu_bwd(
    grad_out: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, params: GLUParams
) -> None:
    """Write the gradients of `swiglu_fwd` to `grad_gate` and `grad_up`, from the gradient of its output."""
    _launch("swiglu_bwd", (grad_out, gate, up), (grad_gate, grad_up), params)


def _launch(name: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    kernel = getattr(_cpu_kernels, name)
    if not kernel(get_num_threads(), *params.scalars(), *inputs, *outputs):
        _launch_strided(name, inputs, outputs, params)


def _launch_strided(name: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    tensors = [tensor for tensor in inputs + outputs if tensor is not None]
    for tensor in tensors:
        _check_memory(tensor)
    layouts = common_layout(tensors[0].shape, *(tensor.stride() for tensor in tensors))
    if layouts is None or any(layout.column_stride > _LARGEST_COLUMN_STRIDE for layout in layouts):
        return _launch_on_copies(name, inputs, outputs, params)
    remaining = iter(layouts)
    strides: list[int] = []
    addresses = []
    for tensor in inputs + outputs:
        strides += (0, 0) if tensor is None else next(remaining)[2:]
        addresses.append(0 if tensor is None else tensor.data_ptr())
    kernel = getattr(_cpu_kernels, f"{name}_strided")
    dtype, (rows, columns) = _DTYPES[tensors[0].dtype], layouts[0][:2]
    kernel(get_num_threads(), *params.scalars(), dtype, rows, columns, tuple(strides), *addresses)


def _check_memory(tensor: Tensor) -> None:
    """Raise if a tensor's storage was freed or made smaller after the tensor was created."""
    size = tensor.untyped_storage().nbytes()
    needed = tensor.itemsize * (tensor.storage_offset() + extent(tensor.shape, tensor.stride()))
    if size < needed and tensor.numel():
        what = "freed" if size == 0 else "made smaller"
        raise RuntimeError(
            f"hf_swiglu: the storage of a tensor of shape {tuple(tensor.shape)} was {what} (it has {size} bytes, and "
            f"the tensor ends at {needed}); use the tensor before that, or resize the storage back"
        )


def _launch_on_copies(name: str, inputs: tuple, outputs: tuple, params: GLUParams) -> None:
    """For tensors without regular rows: launches on contiguous copies, and copies the results to the outputs."""
    inputs = tuple(tensor if tensor is None else tensor.contiguous() for tensor in inputs)
    results = tuple(
        tensor if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in outputs
    )
    _launch(name, inputs, results, params)
    for tensor, result in zip(outputs, results):
        if tensor is not None:
            tensor.copy_(result)
