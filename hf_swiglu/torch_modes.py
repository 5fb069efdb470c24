"""Whether a call is intercepted before its kernel: by transforms, tracers, dispatch modes or profilers."""

from __future__ import annotations

import torch

from hf_swiglu import _compat

# vmap, grad and jvp wrap tensors or attach tangents, which a kernel would drop.
is_transformed = _compat.is_transform_active

# torch.jit.trace records operators. Inductor fuses the plain formula with adjacent operators and decides what is saved;
# it can do neither across a custom operator.
is_tracing = _compat.is_tracing


def is_captured() -> bool:
    """Whether the operators that run here are recorded into a program that runs later."""
    return torch.compiler.is_compiling() or _compat.is_tracing()


def is_observed() -> bool:
    """Whether a dispatch mode or a profiler is active, which must observe the kernel as an operator."""
    return bool(_compat.count_dispatch_modes()) or _compat.is_profiling()


def is_intercepted() -> bool:
    """Whether anything but torch.compile intercepts the call before its kernel."""
    # Calls of the functions above would cost 0.05 us each, in a call of 2.5.
    return bool(_count_modes()) or _is_profiling() or is_transformed() or is_tracing()


_count_modes, _is_profiling = _compat.count_dispatch_modes, _compat.is_profiling
