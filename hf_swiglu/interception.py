"""What may stand between a call and its kernel: transforms, tracers, dispatch modes and profilers."""

from __future__ import annotations

import torch

from hf_swiglu import _compat

# vmap, grad and jvp wrap tensors or attach tangents, which a kernel would drop.
is_transformed = _compat.is_transform_active

# torch.jit.trace records operators. Inductor fuses the plain formula with its neighbours and decides what to keep, to
# which an operator would be a wall.
is_tracing = _compat.is_tracing


def is_captured() -> bool:
    """Whether the operators that run here are recorded into a program that runs later."""
    return torch.compiler.is_compiling() or _compat.is_tracing()


def is_observed() -> bool:
    """Whether a dispatch mode or a profiler is active, which must see a kernel as the operator that it is."""
    return bool(_compat.count_dispatch_modes()) or _compat.is_profiling()


def is_intercepted() -> bool:
    """Whether anything at all stands between a call and its kernel, torch.compile apart."""
    # Not by the functions above: each costs 0.05 us of a call of 2.5.
    return bool(_count_modes()) or _is_profiling() or is_transformed() or is_tracing()


_count_modes, _is_profiling = _compat.count_dispatch_modes, _compat.is_profiling
