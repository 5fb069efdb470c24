"""The forward and the backward operator: schemas, fakes and implementations, and their launch.

Both write into memory that the caller allocates, so one operator serves new outputs, outputs in place of the gate, and
the two halves of a packed gradient. Without `up` they compute the activation alone, which is how the self-gated SwiGLU
runs. `power` and `limits` are `reference.GLUParams.scalars()`.

Neither operator is differentiable: see `autograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_swiglu import backends
from hf_swiglu.reference import GLUParams
from hf_swiglu.torch_modes import is_observed

library = torch.library.Library("hf_swiglu", "DEF")
library.define("swiglu_fwd(Tensor gate, Tensor? up, Tensor(a!) out, int power=1, float[]? limits=None) -> ()")
library.define(
    "swiglu_bwd(Tensor grad_out, Tensor gate, Tensor? up, Tensor(a!) grad_gate, Tensor(b!)? grad_up,"
    " int power=1, float[]? limits=None) -> ()"
)
_fwd = torch.ops.hf_swiglu.swiglu_fwd.default
_bwd = torch.ops.hf_swiglu.swiglu_bwd.default


def launch_fwd(gate: Tensor, up: Tensor | None, out: Tensor, params: GLUParams) -> None:
    """Write `a * (u + up_offset)` of `params` to `out`, which may be `gate`, by the kernel of gate's device.

    The tensors have one shape, device and dtype out of `backends.KERNEL_DTYPES`.
    """
    if is_observed():
        _fwd(gate, up, out, *params.scalars())
    else:
        # PyTorch's dispatcher takes 3 us of a call of 6 (torch 2.13, EPYC 7003).
        backends.kernels(gate).swiglu_fwd(gate, up, out, params)


def launch_bwd(
    grad_out: Tensor, gate: Tensor, up: Tensor | None, grad_gate: Tensor, grad_up: Tensor | None, params: GLUParams
) -> None:
    """Write the gradients of `launch_fwd` to `grad_gate` and `grad_up`, which may be `gate` and `up`."""
    if is_observed():
        _bwd(grad_out, gate, up, grad_gate, grad_up, *params.scalars())
    else:
        backends.kernels(gate).swiglu_bwd(grad_out, gate, up, grad_gate, grad_up, params)


@torch.library.register_fake("hf_swiglu::swiglu_fwd", lib=library)
def _(gate, up, out, power=1, limits=None):
    return None


@torch.library.register_fake("hf_swiglu::swiglu_bwd", lib=library)
def _(grad_out, gate, up, grad_gate, grad_up, power=1, limits=None):
    return None


def _run_fwd(gate: Tensor, up: Tensor | None, out: Tensor, power: int = 1, limits: list[float] | None = None) -> None:
    _check("swiglu_fwd", power, gate, up, out)
    backends.kernels(gate).swiglu_fwd(gate, up, out, GLUParams.of_scalars(power, limits))


def _run_bwd(
    grad_out: Tensor,
    gate: Tensor,
    up: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    power: int = 1,
    limits: list[float] | None = None,
) -> None:
    if (up is None) is not (grad_up is None):
        raise ValueError(
            "hf_swiglu::swiglu_bwd: got only one of up and grad_up; expected both or none; give both of them or neither"
        )
    _check("swiglu_bwd", power, grad_out, gate, up, grad_gate, grad_up)
    backends.kernels(gate).swiglu_bwd(grad_out, gate, up, grad_gate, grad_up, GLUParams.of_scalars(power, limits))


def _check(name: str, power: int, *operands: Tensor | None) -> None:
    tensors = [tensor for tensor in operands if tensor is not None]
    first = tensors[0]
    alike = all(tensor.shape == first.shape and tensor.dtype is first.dtype for tensor in tensors)
    if not alike or first.dtype not in backends.KERNEL_DTYPES:
        given = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(
            f"hf_swiglu::{name} takes tensors of one shape and of one dtype out of float32, bfloat16 and float16; "
            f"got {given}"
        )
    if power not in (1, 2):
        raise ValueError(f"hf_swiglu::{name}: power must be 1 (silu) or 2 (swiglu); got {power}")


for _key in ("CPU", "CUDA", "XPU"):
    library.impl("swiglu_fwd", _run_fwd, _key)
    library.impl("swiglu_bwd", _run_bwd, _key)

# The operators record no graph: without this, autograd's boxed fallback costs 5 us a call (torch 2.13, EPYC 7003).
for _name in ("swiglu_fwd", "swiglu_bwd"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
