"""The functions that rewritten methods call: the product of an activated gate and up, fused where that is equivalent.

Each function receives the values of the original expression, in its order of evaluation. `last_use` states that gate
has one local name, which is not read again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_swiglu import dispatch, reference
from hf_swiglu.patching.activations import fusable, has_no_hooks, is_sigmoid
from hf_swiglu.patching.rewriting.ownership import counts, mark_written, may_be_written, owned_counts
from hf_swiglu.reference import LAYOUTS, GLUParams

# The test takes 2 us of a call, where a new tensor of 4,096 elements takes 1 (torch 2.13, Xeon with AVX-512).
SMALLEST_REUSED = 4096

Activation = Callable[[Tensor], Tensor]


def gated(params: GLUParams, activation: Activation, gate: Tensor, up: Tensor, last_use: bool) -> Tensor:
    """`activation(gate) * up`, for an activation of which `fusable` returned `params`."""
    if type(gate) is not Tensor or type(up) is not Tensor:
        return activation(gate) * up
    if gate.numel() > SMALLEST_REUSED and may_be_written(gate, up) and counts(gate) == owned_counts(last_use):
        return _over_gate(gate, up, params)
    return dispatch.swiglu(gate, up, params)


def times(
    up: Tensor, activation: Activation, gate: Tensor, last_use: bool, multiply: Callable = operator.mul
) -> Tensor:
    """`up * activation(gate)`, evaluated in this order."""
    params = fusable(activation) if multiply is operator.mul else fusable(activation, multiply)
    if params is None or type(gate) is not Tensor or type(up) is not Tensor:
        return multiply(up, activation(gate))
    if gate.numel() > SMALLEST_REUSED and may_be_written(gate, up) and counts(gate) == owned_counts(last_use):
        return _over_gate(gate, up, params)
    return dispatch.swiglu(gate, up, params)


def family(
    activation: object,
    *,
    sigmoid: object = None,
    alpha: object = 1.0,
    gate_limit: object = math.inf,
    act_limit: object = math.inf,
    up_limit: object = math.inf,
    up_offset: object = 0.0,
) -> GLUParams | None:
    """The member of the family with these limits; None where a limit is not a number, or the activation not fusable.

    Swish is `activation`, or written out with `sigmoid` where `activation` is None.
    """
    if activation is None:
        power = 1 if is_sigmoid(sigmoid) else 0
    else:
        params = fusable(activation)
        power = params.power if params is not None else 0
    limits = (alpha, gate_limit, act_limit, up_limit, up_offset)
    if not power or not all(type(limit) in (int, float) for limit in limits):
        return None
    params = GLUParams(power, *map(float, limits))  # type: ignore[arg-type]
    # With a negative limit, or NaN, PyTorch computes the original expression.
    return params if params.up_limit >= 0 and not any(map(math.isnan, params)) else None


def chained(params: GLUParams, activation: Activation | None, last_use: bool, *, gate: Tensor, up: Tensor) -> Tensor:
    """The product of a `gated_products.Chain` with gate and up in two tensors."""
    if type(gate) is not Tensor or type(up) is not Tensor or _rounds_otherwise(params, activation, gate):
        return _plain(params, activation, gate, up)
    if gate.numel() > SMALLEST_REUSED and may_be_written(gate, up) and counts(gate) == owned_counts(last_use):
        return _over_gate(gate, up, params)
    return dispatch.swiglu(gate, up, params)


def packed(
    params: GLUParams,
    activation: Activation | None,
    gate_up: Tensor,
    layout: str,
    last_use: bool,
    module: nn.Module | None = None,
    path: str = "",
) -> Tensor:
    """The product of a `Chain` with gate and up in one tensor, which `module.path` consumes, if known."""
    if type(gate_up) is not Tensor or _rounds_otherwise(params, activation, gate_up):
        return _plain(params, activation, *LAYOUTS[layout](gate_up))
    if (
        module is not None
        and gate_up.numel() > SMALLEST_REUSED
        and may_be_written(gate_up)
        and counts(gate_up) == owned_counts(last_use)
        and _reads_rows_in_place(operator.attrgetter(path)(module))
    ):
        gate, up = LAYOUTS[layout](gate_up)
        return _over_gate(gate, up, params)
    return dispatch.swiglu_packed(gate_up, params, layout)


def _over_gate(gate: Tensor, up: Tensor, params: GLUParams) -> Tensor:
    result = dispatch.swiglu_inplace(gate, up, params)
    if result is gate:
        mark_written(gate)
    return result


def _rounds_otherwise(params: GLUParams, activation: Activation | None, gate: Tensor) -> bool:
    """Whether swish is written out as `g * sigmoid(g)`: it rounds twice in 16 bits, where the kernels round once."""
    return activation is None and params.alpha == 1.0 and gate.dtype in (torch.bfloat16, torch.float16)


def _plain(params: GLUParams, activation: Activation | None, gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu_fwd(gate, up, params, activation or reference.written_swish(params.alpha))


def _reads_rows_in_place(down: object) -> bool:
    """Whether the projection reads strided rows without a copy; with a bias it would copy them."""
    if type(down) is not nn.Linear or down.bias is not None:
        return False
    state = vars(down)
    return "forward" not in state and has_no_hooks(state, lambda hook: False)
