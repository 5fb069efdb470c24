"""Which kernels can run here, and why the others cannot. Nothing is probed before it is needed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from hf_swiglu import _ops
from hf_swiglu.reference import SILU, SWIGLU, Gating

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many elements plain PyTorch is faster, or no slower: with a backward, where an autograd.Function adds up to
# 10 us to eager's 33; and without one where the kernel cannot be handed the tensors as they are (see `direct`), because
# their rows lie apart or a dispatch mode is active. Eager's time over ours, float32 and bfloat16, 2 threads: with a
# backward 0.95 to 1.03 and 1.03 to 1.20 at 12,288 elements, 1.02 to 1.08 and 1.13 to 1.30 at 16,384 (EPYC 9004, packed
# and separate); without one 0.94 and 1.28 at 8,192, 1.16 and 1.56 at 12,288 (EPYC 7003).
SMALLEST_KERNEL = {"cpu": 10_000, "cuda": 0, "xpu": 0}
SMALLEST_DIFFERENTIATED = {"cpu": 12_288, "cuda": 0, "xpu": 0}


class Backend(NamedTuple):
    """What one kernel family serves, and whether it can run here."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    available: bool
    detail: str


def available_backends() -> tuple[Backend, ...]:
    """Every backend in the order of preference, those that cannot run here with the reason in `detail`.

    Example:
        >>> from hf_swiglu import available_backends
        >>> [backend.name for backend in available_backends()]
        ['cpu', 'triton', 'pytorch']
    """
    cpu_reason = unavailable("cpu")
    cpu_detail = cpu_reason or f"C kernel, {_cpu().instruction_set()}, {torch.get_num_threads()} threads"
    triton_devices = tuple(device for device in ("cuda", "xpu") if unavailable(device) is None)
    triton_detail = f"Triton {_triton_version()}" if triton_devices else str(unavailable("cuda"))
    return (
        Backend("cpu", ("cpu",), KERNEL_DTYPES, cpu_reason is None, cpu_detail),
        Backend("triton", triton_devices or ("cuda", "xpu"), KERNEL_DTYPES, bool(triton_devices), triton_detail),
        Backend("pytorch", ("any",), (*KERNEL_DTYPES, torch.float64), True, "the plain formula, for everything else"),
    )


def serves(tensor: Tensor, elements: int, differentiated: bool) -> bool:
    """Whether a kernel runs for so many elements of this tensor's device and dtype, with gradients to follow or not."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    smallest = (SMALLEST_DIFFERENTIATED if differentiated else SMALLEST_KERNEL).get(device)
    return (
        smallest is not None and elements > smallest and tensor.dtype in KERNEL_DTYPES and unavailable(device) is None
    )


@functools.cache
def unavailable(device: str) -> str | None:
    """Why no kernel runs on this type of device, or None when one does."""
    if device == "cpu":
        if importlib.util.find_spec("hf_swiglu.backends._cpu_kernels") is None:
            return "the C extension was not built when the package was installed (no working C compiler was found)"
        return None
    if device not in ("cuda", "xpu"):
        return f"there is no kernel for {device} devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # 3.3 rejects a named tuple as a constexpr.
    if Version(_triton_version()) < Version("3.4"):
        return f"Triton {_triton_version()} is too old; the kernels need 3.4"
    if not getattr(torch, device).is_available():
        return f"PyTorch {torch.__version__} sees no {device} device"
    return None


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")


@functools.cache
def _cpu():
    from hf_swiglu.backends import cpu

    return cpu


def cpu_kernel(name: str) -> Callable[..., bool] | None:
    """The CPU kernel that takes contiguous tensors as they are, and says whether it took them; None without one."""
    return None if unavailable("cpu") else _cpu().tensor_kernel(name)


def scalars(gating: Gating) -> tuple[int, list[float] | None]:
    """The operators' last arguments; `_ops` says why the usual limits are left out."""
    if gating is SILU or gating == SILU:
        return 1, None
    if gating == SWIGLU:
        return 2, None
    return gating.power, list(gating[1:])


def product(gate: Tensor, up: Tensor | None, out: Tensor, scalars: tuple) -> None:
    """The operator `product`, on tensors that are known to go together."""
    if _is_direct(gate):
        _cpu().run("product", (gate, up), (out,), *scalars)
    else:
        _ops.product(gate, up, out, *scalars)


def product_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, scalars: tuple
) -> None:
    """The operator `product_backward`, on tensors that are known to go together."""
    if _is_direct(gate):
        _cpu().run("product_backward", (grad, gate, up), (grad_gate, grad_up), *scalars)
    else:
        _ops.product_backward(grad, gate, up, grad_gate, grad_up, *scalars)


def _is_direct(tensor: Tensor) -> bool:
    # With no mode and no profiler active, PyTorch's dispatcher has nothing to decide; it takes 3 us of a call of 6
    # (torch 2.13, EPYC 7003).
    return tensor.is_cpu and torch._C._len_torch_dispatch_stack() == 0 and not torch.autograd._profiler_enabled()


def _dispatch(backend, name: str, *args) -> None:
    getattr(backend(), name)(*args)


@functools.cache
def _triton():
    from hf_swiglu.backends import triton

    return triton


# The kernels are imported by the first call that PyTorch dispatches to them, never by `import hf_swiglu`.
for _key, _backend in (("CPU", _cpu), ("CUDA", _triton), ("XPU", _triton)):
    for _name in ("product", "product_backward"):
        _ops.library.impl(_name, functools.partial(_dispatch, _backend, _name), _key)
