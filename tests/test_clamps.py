"""The clamped family has the gradients of the installed PyTorch, on the limits themselves too."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hf_swiglu import backends, patch_model, reference
from hf_swiglu.reference import GLUParams

LIMIT = 0.7


def gradients(function, gate, up):
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    function(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")
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
    expected = gradients(lambda g, u: reference.swiglu_fwd(g, u, params), gate, up)
    ours = [torch.empty_like(gate), torch.empty_like(up)]
    cpu.product_backward(torch.ones_like(gate), gate, up, *ours, *backends.scalars(params))
    for mine, plain in zip(ours, expected):
        torch.testing.assert_close(mine, plain, equal_nan=True)
        assert torch.equal(mine == 0, plain == 0)


def test_gradients_of_gpt_oss_on_its_limits():
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=64, intermediate_size=128, num_local_experts=2, swiglu_limit=1.5)
    experts = GptOssExperts(config)
    gate_up = torch.randn(200, 256) * 2
    gate_up[::3] = torch.where(gate_up[::3] > 0, experts.limit, -experts.limit)
    results = []
    for _ in range(2):
        leaf = gate_up.clone().requires_grad_()
        experts._apply_gate(leaf).sum().backward()
        results.append(leaf.grad)
        patch_model(nn.Sequential(experts))
    torch.testing.assert_close(*results)
