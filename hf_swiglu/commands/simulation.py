"""A training step on the meta device: the bytes and the arithmetic of the real one, from a config alone.

Every operator runs with shapes and no memory, and so does whatever decides what to keep: saved-tensor hooks,
recomputation, checkpoints, tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from hf_swiglu import _compat
from hf_swiglu.commands.memory import LiveBytes, storages

ATTENTION = "hf_swiglu_simulated"


@dataclass(frozen=True)
class Cost:
    """Bytes that stay alive from forward to backward, those that calls of the given modules leave alive among them;
    bytes at the peak; floating-point operations of matrix products."""

    kept: int
    kept_by_modules: int
    peak: int
    flops: int


def simulate(forward: Callable[[], Tensor], modules: Iterable[nn.Module] = ()) -> Cost:
    """The cost of `forward()` and of the backward of its sum, beside the tensors that exist already.

    What forward returns, and the outputs of the modules, are not counted among the bytes that they keep.
    """
    with _Simulation() as simulation:
        with _kept_bytes(simulation, modules) as kept_by_modules:
            output = forward()
        kept = simulation.live - output.untyped_storage().nbytes()
        output.sum().backward()
    return Cost(kept, sum(kept_by_modules), simulation.peak, simulation.flops)


@contextlib.contextmanager
def _kept_bytes(simulation: _Simulation, modules: Iterable[nn.Module]) -> Iterator[list[int]]:
    """Inside, each call of a module appends the bytes that it leaves alive beside its output."""
    started: list[int] = []
    kept: list[int] = []

    def before(module: nn.Module, arguments: object) -> None:
        started.append(simulation.live)

    def after(module: nn.Module, arguments: object, output: object) -> None:
        kept.append(simulation.live - started.pop() - sum(each.nbytes() for each in storages(output).values()))

    handles = [handle for module in modules for handle in _register(module, before, after)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Simulation(LiveBytes):
    """Counts the arithmetic of operators as well, and answers branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Branches of transformers depend on whether a mask is all ones, and omit it then.
            return args[0].dtype == torch.bool
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


_compat.passive_modes.add(_Simulation)


def _register(module: nn.Module, before: Callable, after: Callable) -> tuple[RemovableHandle, RemovableHandle]:
    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


class _Attention(torch.autograd.Function):
    """Flash attention as far as memory goes: query, key, value, the result and a number for each row are kept."""

    @staticmethod
    def forward(ctx, query, key, value):
        # In query's order of memory, as PyTorch's kernels have it: layers that transpose it back need no copy then.
        same_width = query.shape[-1] == value.shape[-1]
        result = torch.empty_like(query) if same_width else query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **options):
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
