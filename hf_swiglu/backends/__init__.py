"""Which kernels can run here, and why the others cannot. A kernel is imported by the first call that needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """The devices and dtypes of one kernel family, and whether it can run here."""

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
    cpu_detail = cpu_reason or cpu_kernels().describe()
    triton_devices = tuple(device for device in ("cuda", "xpu") if unavailable(device) is None)
    triton_detail = f"Triton {_triton_version()}" if triton_devices else str(unavailable("cuda"))
    return (
        Backend("cpu", ("cpu",), KERNEL_DTYPES, cpu_reason is None, cpu_detail),
        Backend("triton", triton_devices or ("cuda", "xpu"), KERNEL_DTYPES, bool(triton_devices), triton_detail),
        Backend("pytorch", ("any",), (*KERNEL_DTYPES, torch.float64), True, "the plain formula, for everything else"),
    )


@functools.cache
def unavailable(device: str) -> str | None:
    """Why no kernel runs on this type of device, or None when one does."""
    if device == "cpu":
        if importlib.util.find_spec("hf_swiglu.backends._cpu_kernels") is None:
            return "the C extension was not built when the package was installed (no working C compiler was found)"
        try:
            importlib.import_module("hf_swiglu.backends._cpu_kernels")
        except ImportError as error:
            # A wheel contains no OpenMP library: torch's copy is loaded, or the system's.
            return f"the C extension cannot be loaded: {error}"
        return None
    if device == "meta":
        return None
    if device not in ("cuda", "xpu"):
        return f"there is no kernel for {device} devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # 3.3 rejects a named tuple as a constexpr.
    if Version(_triton_version()) < Version("3.4"):
        return f"Triton {_triton_version()} is too old; the kernels need 3.4"
    if not getattr(torch, device).is_available():
        return f"PyTorch {torch.__version__} finds no {device} device"
    return None


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")


def kernels(tensor: Tensor) -> ModuleType:
    """The module with `swiglu_fwd` and `swiglu_bwd` for this tensor's device."""
    if tensor.is_cpu:
        return cpu_kernels()
    return _meta_kernels() if tensor.is_meta else triton_kernels()


@functools.cache
def cpu_kernels() -> ModuleType:
    return importlib.import_module("hf_swiglu.backends.cpu")


@functools.cache
def triton_kernels() -> ModuleType:
    return importlib.import_module("hf_swiglu.backends.triton")


@functools.cache
def _meta_kernels() -> ModuleType:
    return importlib.import_module("hf_swiglu.backends.meta")
