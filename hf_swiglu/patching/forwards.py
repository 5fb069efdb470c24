"""The forward of modules with keep=0 or keep=1, or with a tile, around the rewritten one.

What is done is decided at every call: whether gradients are needed, how many rows there are, and whether the module, as
it is now, may be run again in backward or on a part of its rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from hf_swiglu import _compat
from hf_swiglu.interception import is_tracing, is_transformed
from hf_swiglu.patching import children, compiled, regions, rowwise
from hf_swiglu.patching.memory import Memory

# With fewer rows nothing is computed again.
SMALLEST_RECOMPUTED = 32


def outer(rewritten: object, original: type[nn.Module], memory: Memory) -> Callable[..., Any]:
    """A forward that calls `rewritten`, or what `original` has for a forward where none of it is rewritten."""
    call_compiled = compiled.caller(memory)
    code = getattr(inspect.unwrap(original.forward), "__code__", None)
    parameter = code.co_varnames[1] if code is not None and code.co_argcount > 1 else ""

    def inner(self, *args, **kwargs):
        return (rewritten or original.forward)(self, *args, **kwargs)  # type: ignore[operator]

    def forward(self, *args, **kwargs):
        if is_dynamo_compiling():
            return call_compiled(original.forward, self, *args, **kwargs)
        x = _input(args, kwargs, parameter)
        if x is None or not _is_ordinary():
            return inner(self, *args, **kwargs)
        if not _needs_gradients(self, x):
            return _without_gradients(inner, self, x, original, memory)
        return _with_gradients(inner, self, x, original, memory)

    like: Any = rewritten or original.forward
    return functools.wraps(like)(forward)


def _input(args: tuple, kwargs: dict[str, Any], parameter: str) -> Tensor | None:
    """The one tensor that the forward is called with, by its place or its name."""
    given = (*args, *kwargs.values())
    if len(given) != 1 or not kwargs.keys() <= {parameter}:
        return None
    (x,) = given
    return x if isinstance(x, Tensor) and x.dim() > 0 and x.numel() > 0 else None


def _is_ordinary() -> bool:
    """Whether nothing is active that sees each operator or forbids hooks: there the forward runs as it is."""
    return (
        _compat.can_step_outside_hooks
        and _compat.can_pack_saved_tensors()
        and not _compat.is_any_mode_active()
        and not is_transformed()
        and not is_tracing()
    )


def _needs_gradients(module: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in module.parameters()))


def _without_gradients(inner: Callable, module: nn.Module, x: Tensor, original: type, memory: Memory) -> Tensor:
    tile = memory.tile
    if tile is None or not _may_be_cut(module, x, tile) or rowwise.shown(module, original).not_rowwise:
        return inner(module, x)
    rows, out = x.reshape(-1, x.shape[-1]), None
    for start in range(0, len(rows), tile):
        part = inner(module, rows[start : start + tile])
        if out is None:
            out = part.new_empty((len(rows), part.shape[-1]))
        out[start : start + len(part)] = part
    assert out is not None
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _with_gradients(inner: Callable, module: nn.Module, x: Tensor, original: type, memory: Memory) -> Tensor:
    # Where the projections communicate, every process has to call them equally often, whatever its number of rows.
    if _rows(x) < SMALLEST_RECOMPUTED and not children.communicates(module):
        return inner(module, x)
    shown = rowwise.shown(module, original)
    if shown.not_repeatable:
        return inner(module, x)
    forward = functools.partial(inner, module)
    if memory.tile is None or shown.not_rowwise or not _may_be_cut(module, x, memory.tile):
        return regions.run(forward, x)
    parts = [regions.run(forward, rows) for rows in x.reshape(-1, x.shape[-1]).split(memory.tile)]
    return torch.cat(parts).reshape(*x.shape[:-1], parts[0].shape[-1])


def _may_be_cut(module: nn.Module, x: Tensor, tile: int) -> bool:
    return (
        _rows(x) > tile
        and type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
        and not children.communicates(module)
    )


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
