"""Which kernels can run here, and why the others cannot. Nothing is probed before it is needed."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from hf_swiglu import _ops

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many elements plain PyTorch is faster. Whole calls, 2 threads of an EPYC 7003, eager's time over ours for
# float32 and bfloat16: without gradients 0.94 and 1.28 at 8,192 elements, 1.16 and 1.56 at 12,288; with a backward,
# where an autograd.Function adds 45 us, 1.02 and 1.16 at 24,576, 1.09 and 1.28 at 40,000.
SMALLEST_KERNEL = {"cpu": 10_000, "cuda": 0, "xpu": 0}
SMALLEST_DIFFERENTIATED = {"cpu": 32_768, "cuda": 0, "xpu": 0}


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


def serves(tensor: Tensor, differentiated: bool) -> bool:
    """Whether a kernel runs for this tensor's device, dtype and size, with gradients to follow or without."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    smallest = (SMALLEST_DIFFERENTIATED if differentiated else SMALLEST_KERNEL).get(device)
    return (
        smallest is not None
        and tensor.numel() > smallest
        and tensor.dtype in KERNEL_DTYPES
        and unavailable(device) is None
    )


def is_tiny(tensor: Tensor) -> bool:
    """Whether no kernel runs for this tensor because plain PyTorch is faster; False under torch.compile, which would
    specialise on the size."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and tensor.numel() <= SMALLEST_KERNEL["cpu"]


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
    # With nobody to look on, PyTorch's dispatcher has nothing to decide; it takes 3 us of a call of 6 (torch 2.13,
    # EPYC 7003).
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
