"""`GLUParams` (SILU, SWIGLU and the clamped ones) and their functions in plain PyTorch: the definition of correct.

They are the fallback everywhere. In float64 every kernel is tested against them. In any other dtype they are exactly
what eager PyTorch computes for an unpatched model, so falling back to them never changes a result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from hf_swiglu.new_thread import in_new_thread


class GLUParams(NamedTuple):
    r"""One member of the SwiGLU family: what happens to `gate` and `up` before they are multiplied.

        g = min(gate, gate_limit)              a = min(g^(power - 1) * g * sigmoid(alpha * g), act_limit)
        u = clamp(up, -up_limit, up_limit)     product = a * (u + up_offset)

    The defaults are the gated SwiGLU of Shazeer (2020, https://arxiv.org/abs/2002.05202), `swish(gate) * up`.
    `power=2` gates with the self-gated SwiGLU, `gate * swish(gate)`. The limits, `alpha` and `up_offset` are
    those of the clamped variants, for instance GPT-OSS with alpha 1.702, both limits 7 and offset 1
    (https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py); `act_limit` is Step-3.7's.
    """

    power: int = 1
    alpha: float = 1.0
    gate_limit: float = math.inf
    act_limit: float = math.inf
    up_limit: float = math.inf
    up_offset: float = 0.0

    def scalars(self) -> tuple[int, list[float] | None]:
        """(power, the other fields), without the others where all have their defaults.

        Six scalars cost the operators 2.7 us of a call of 1.8 us (torch 2.13, EPYC 7003).
        """
        if self is SILU or self is SWIGLU:
            return self.power, None
        limits = list(self[1:])
        return self.power, None if limits == _DEFAULT_LIMITS else limits

    @classmethod
    def of_scalars(cls, power: int, limits: list[float] | None) -> GLUParams:
        """The inverse of `scalars`."""
        if limits is None and power in (1, 2):
            return SWIGLU if power == 2 else SILU
        return cls(power, *(limits or ()))


SILU = GLUParams()
SWIGLU = GLUParams(power=2)
_DEFAULT_LIMITS = list(SILU[1:])

# Where gate and up lie in a packed tensor [..., 2 * I]; all are views.
LAYOUTS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "gate_up": lambda packed: packed.chunk(2, dim=-1),
    "up_gate": lambda packed: packed.chunk(2, dim=-1)[::-1],
    "interleaved": lambda packed: (packed[..., ::2], packed[..., 1::2]),
}


def swiglu_fwd(
    gate: Tensor, up: Tensor | None, params: GLUParams = SILU, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`a * (u + up_offset)` of the formula in `GLUParams`; `a` alone where there is no `up`.

    `activation`, where given, is applied to the limited gate in place of the formula's own.
    """
    # Dynamo of torch 2.8 cannot trace `is` of two named tuples.
    if not is_dynamo_compiling() and (params is SILU or params is SWIGLU):
        # Without limits: five comparisons take 0.3 us, where small products take 3.
        activated = activation(gate) if activation else swish_power(gate, params.power, 1.0)
        return activated if up is None else activated * up
    if params.gate_limit != math.inf:
        gate = gate.clamp(max=params.gate_limit)
    activated = activation(gate) if activation else swish_power(gate, params.power, params.alpha)
    if params.act_limit != math.inf:
        activated = activated.clamp(max=params.act_limit)
    if up is None:
        return activated
    if params.up_limit != math.inf:
        up = up.clamp(min=-params.up_limit, max=params.up_limit)
    if params.up_offset:
        up = up + params.up_offset
    return activated * up


def swiglu_fwd_inplace(gate: Tensor, up: Tensor, params: GLUParams = SILU) -> Tensor:
    """`swiglu_fwd` of tensors of one shape and dtype, written over gate where no limit applies: no new buffer."""
    if params == SILU:
        return F.silu(gate, inplace=True).mul_(up)
    if params == SWIGLU:
        return gate.mul_(F.silu(gate)).mul_(up)
    return swiglu_fwd(gate, up, params)


@functools.cache
def clamp_passes_at_limit() -> bool:
    """Whether the gradient of this PyTorch's clamp passes at the limit itself: up to 2.13 it does, in 2.14 it is 0."""

    def gradient() -> list[float]:
        x = torch.ones(1, requires_grad=True)
        return torch.autograd.grad(x.clamp(max=1.0), x, torch.ones(1))[0].tolist()

    return in_new_thread(gradient) == [1.0]


def written_swish(alpha: float) -> Callable[[Tensor], Tensor]:
    """`gate * sigmoid(alpha * gate)`, in the operators of a forward that writes it out."""
    return lambda gate: gate * torch.sigmoid(gate if alpha == 1.0 else gate * alpha)


def swish_power(gate: Tensor, power: int, alpha: float) -> Tensor:
    """`g^power * sigmoid(alpha * g)`."""
    activated = F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)
    return gate * activated if power == 2 else activated
