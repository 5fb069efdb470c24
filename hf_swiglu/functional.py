"""The public functions of tensors: validation of arguments, and errors. `dispatch` computes the results."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_swiglu import dispatch
from hf_swiglu.reference import SILU, SWIGLU


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    r"""SwiGLU of one tensor (self-gated) or of two (gated).

        swiglu(x)        = x * swish(x)        swish(x) = x * sigmoid(x)
        swiglu(gate, up) = swish(gate) * up

    The two-tensor form is the one of Shazeer, "GLU Variants Improve Transformer" (2020,
    https://arxiv.org/abs/2002.05202), which LLaMA computes with `hidden_act="silu"`; the one-tensor form is its
    case `gate = up = x`, and what `hidden_act="swiglu"` names.

    Args:
        gate: floating-point tensor of any shape.
        up: tensor of gate's shape on gate's device. Mixed floating dtypes follow PyTorch's promotion.

    Returns:
        A tensor of the same shape. In bfloat16 and float16 it has the bits of the formula in eager PyTorch; in float32
        it is rounded once at the end where a kernel runs: see `available_backends`.

    Raises:
        TypeError: an argument is not a tensor, or not of a real floating-point dtype.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch
        >>> from hf_swiglu import swiglu
        >>> swiglu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.2689, 0.0000, 3.5232])
        >>> swiglu(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
        tensor([ 2.1932, -1.7616])
    """
    return dispatch.swiglu(gate, up, SWIGLU if up is None else SILU, _checked)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    r"""Gated SwiGLU of a packed tensor, without copying either half.

        gate, up = gate_up.chunk(2, dim=-1)        swiglu_packed(gate_up) = swish(gate) * up

    Args:
        gate_up: floating-point tensor `[..., 2 * I]`, gate first (Phi-3, GLM-4, most mixtures of experts).

    Returns:
        A tensor `[..., I]`.

    Raises:
        TypeError: not a tensor, or not of a real floating-point dtype.
        ValueError: no last dimension, or one of odd width.

    Example:
        >>> import torch
        >>> from hf_swiglu import swiglu_packed
        >>> swiglu_packed(torch.tensor([[1.0, 2.0, 3.0, -1.0]]))
        tensor([[ 2.1932, -1.7616]])
    """
    _check_floating("swiglu_packed", "gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu_packed: the last dimension holds gate and up side by side, so its width must be even; "
            f"got gate_up of shape {tuple(gate_up.shape)}"
        )
    return dispatch.swiglu_packed(gate_up)


def _checked(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Validates the arguments of `swiglu` and returns them in one dtype.

    Raises:
        TypeError, ValueError: as `swiglu`.
    """
    _check_floating("swiglu", "gate", gate)
    if up is None:
        return gate, None
    if not isinstance(up, Tensor) or up.dtype is not gate.dtype:
        _check_floating("swiglu", "up", up)
        common = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(common), up.to(common)
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: gate and up must have the same shape; got gate {tuple(gate.shape)} and up {tuple(up.shape)}"
        )
    if gate.device != up.device:
        raise ValueError(
            f"swiglu: gate and up must be on the same device; got gate on {gate.device} and up on {up.device}"
        )
    return gate, up


def _check_floating(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{function}: {name} must have a real floating-point dtype (float32, bfloat16, float16, float64); "
            f"got {value.dtype}. Convert it first, for instance {name}.float()"
        )
