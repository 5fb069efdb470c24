"""The peak memory of one call, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_swiglu import _compat


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that one call has alive at once, without those that existed before it."""
    if device.type == "cpu":
        with LiveBytes() as memory:
            run()
        return memory.peak
    library = getattr(torch, device.type)
    run()
    library.reset_peak_memory_stats(device)
    start = library.memory_allocated(device)
    run()
    return library.max_memory_allocated(device) - start


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators create, from creation until their storage is freed.

    Not the resident memory of the process, because the C library keeps what is freed. Memory that an operator
    allocates and frees before it returns is not counted. It works on the meta device as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = set(storages((args, kwargs)))
        for key, storage in storages(result).items():
            # A view, or a result in place, shares its input's storage.
            if key not in inputs:
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, size)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


# Patched modules take the same paths under this mode as without it.
_compat.passive_modes.add(LiveBytes)


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested containers, by identity."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}
