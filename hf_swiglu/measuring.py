"""How long a call takes, and how much memory it allocates at its peak, on whatever device."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_swiglu import _compat


def default_device() -> torch.device:
    """The GPU, if there is one."""
    names = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
    return torch.device(names[0] if names else "cpu")


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, all of the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that one call has alive at once, beside those that were there before it."""
    if device.type == "cpu":
        with _LiveTensors() as tensors:
            run()
        return tensors.peak
    library = getattr(torch, device.type)
    run()
    library.reset_peak_memory_stats(device)
    start = library.memory_allocated(device)
    run()
    return library.max_memory_allocated(device) - start


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operators create, from creation until their memory is given back.

    A process's resident memory would miss the point: the C library keeps what is freed. What an operator allocates
    for itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {_storage(tensor).data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            # A view, or a result in place, has its input's memory.
            if isinstance(tensor, Tensor) and _storage(tensor).data_ptr() not in inputs:
                size = _storage(tensor).nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(_storage(tensor), self._release, size)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


# Measured as it runs without it.
_compat.passive_modes.add(_LiveTensors)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
