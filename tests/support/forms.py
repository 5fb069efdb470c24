"""The three forms of the function, each with plain PyTorch's version, and inputs for them."""

import pytest
import torch
import torch.nn.functional as F

from hf_swiglu import swiglu, swiglu_packed

ROWS, COLUMNS = 130, 128  # more elements than `dispatch.SMALLEST_DIFFERENTIATED["cpu"]`


def self_gated(x):
    return x * F.silu(x)


def gated(gate, up):
    return F.silu(gate) * up


def packed(gate_up):
    return gated(*gate_up.chunk(2, dim=-1))


FORMS = {"self-gated": (swiglu, self_gated), "gated": (swiglu, gated), "packed": (swiglu_packed, packed)}
every_form = pytest.mark.parametrize("form", FORMS)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(form, *shape, dtype=torch.float32):
    """Inputs whose product has `shape`, ROWS x COLUMNS if none is given; the same ones at every call."""
    *lead, width = shape or (ROWS, COLUMNS)
    size = (*lead, 2 * width if form == "packed" else width)
    return [random(*size, dtype=dtype, seed=seed) for seed in range(2 if form == "gated" else 1)]


def leaves(form, *shape, dtype=torch.float32):
    """`operands` that require gradients."""
    return [tensor.requires_grad_() for tensor in operands(form, *shape, dtype=dtype)]
