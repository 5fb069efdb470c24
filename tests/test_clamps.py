"""The clamped family has the gradients of the installed PyTorch, on the limits themselves too."""

from functools import partial

import pytest
import torch
from support.kernel import launched, needs_kernel
from support.outcome import outcome
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hf_swiglu import backends, patch_model, reference
from hf_swiglu.reference import GLUParams
from hf_swiglu.testing import counted_launches

LIMIT = 0.7


@needs_kernel
@pytest.mark.parametrize("dtype", backends.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "params",
    [
        GLUParams(gate_limit=LIMIT),
        GLUParams(up_limit=LIMIT),
        GLUParams(act_limit=LIMIT),
        GLUParams(2, 1.7, LIMIT, LIMIT, LIMIT, 1.0),
    ],
)
def test_gradients_on_the_limit(params, dtype):
    from hf_swiglu.backends import cpu

    limit = torch.tensor(LIMIT).to(dtype)
    around = [-limit, limit, torch.nextafter(limit, torch.zeros_like(limit)), torch.nextafter(limit, 2 * limit)]
    values = torch.stack([*around, torch.zeros_like(limit), torch.full_like(limit, float("nan"))])
    gate, up = (x.reshape(-1).contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    grad = torch.ones_like(gate)
    _, *expected = outcome(partial(reference.swiglu_fwd, params=params), gate, up, grad_out=grad).values()
    results = [torch.empty_like(gate), torch.empty_like(up)]
    cpu.swiglu_bwd(grad, gate, up, *results, params)
    for result, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True)
        assert torch.equal(result == 0, plain == 0)


def test_gradients_of_gpt_oss_on_its_limits():
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=64, intermediate_size=128, num_local_experts=2, swiglu_limit=1.5)
    experts = GptOssExperts(config)
    gate_up = torch.randn(200, 256) * 2
    gate_up[::3] = torch.where(gate_up[::3] > 0, experts.limit, -experts.limit)
    expected = outcome(experts._apply_gate, gate_up)
    patch_model(nn.Sequential(experts))
    with counted_launches() as launches:
        torch.testing.assert_close(outcome(experts._apply_gate, gate_up), expected)
    assert launches.names == launched("swiglu_fwd", "swiglu_bwd")
