"""nnsight reads and replaces activations inside a patched model."""

import pytest
import torch
from nnsight import NNsight, save
from nnsight._c import unmount
from support.models import tiny_llama, tokens

from hf_swiglu import patch_model

# The import adds a method to every object of the process; torch's ONNX exporter then calls it for its own.
unmount("save")

SETTINGS = [{"keep": 3}, {"keep": 2}, {"keep": 1}, {"keep": 0}, {"tile": 4}]


def traced(model):
    traced_model, ids = NNsight(model), tokens()
    first, second = traced_model.model.layers[0].mlp, traced_model.model.layers[1].mlp
    with traced_model.trace(ids):
        # In the order of the forward.
        gate = save(first.gate_proj.output)
        product = save(first.down_proj.input)
        out = save(first.output)
        second.up_proj.output[:] = 0
        logits = save(traced_model.output.logits)
    return [each.detach().clone() for each in (gate, product, out, logits)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_read_and_what_a_replaced_activation_changes(setting):
    expected = traced(tiny_llama())
    assert not torch.equal(expected[-1], tiny_llama()(tokens()).logits)
    model = tiny_llama()
    assert len(patch_model(model, **setting).fused) == 2
    torch.testing.assert_close(traced(model), expected)
