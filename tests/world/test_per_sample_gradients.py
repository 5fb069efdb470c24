"""opacus: its hooks on the projections compute each sample's gradients, for differential privacy."""

import pytest
import torch
from opacus import GradSampleModule
from support.models import tiny_llama, tokens

from hf_swiglu import patch_model

SETTINGS = [{"keep": 3}, {"keep": 2}, {"keep": 1}, {"keep": 0}, {"tile": 4}]


def sample_gradients(model):
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    wrapped = GradSampleModule(model.train(), strict=False)
    wrapped(input_ids=ids, labels=ids, position_ids=positions).loss.backward()
    return {name: weight.grad_sample for name, weight in wrapped.named_parameters() if hasattr(weight, "grad_sample")}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_of_each_sample(setting):
    expected = sample_gradients(tiny_llama())
    assert any("up_proj" in name for name in expected)
    model = tiny_llama()
    assert len(patch_model(model, **setting).fused) == 2
    torch.testing.assert_close(sample_gradients(model), expected)
