"""A fused model exported to ONNX is the original's graph, of ONNX's own operators, and computes the same."""

import collections

import onnxruntime
import pytest
import torch
from support.models import tiny_llama, tokens
from test_model_capture import Logits

from hf_swiglu import patch_model


@pytest.mark.parametrize("setting", [{}, {"keep": 0}], ids=str)
def test_onnx(setting, tmp_path):
    plain, model = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    patch_model(model, **setting)
    operators = []
    for each in (plain, model):
        program = torch.onnx.export(Logits(each), (tokens(),), dynamo=True)
        nodes = program.model_proto.graph.node
        operators.append(collections.Counter((node.domain, node.op_type) for node in nodes))
    assert operators[1] == operators[0]
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: tokens().numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), plain(tokens()).logits.detach())
