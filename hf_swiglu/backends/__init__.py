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
# float32 and bfloat16: without gradients 0.9 and 1.2 at 16,384 elements, 1.2 and 1.4 at 24,576; forward and backward,
# where an autograd.Function adds 45 us, 0.95 and 1.0 at 40,000, 1.1 and 1.1 at 65,536.
SMALLEST_KERNEL = {"cpu": 20_000, "cuda": 0, "xpu": 0}
SMALLEST_DIFFERENTIATED = {"cpu": 65_535, "cuda": 0, "xpu": 0}


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
