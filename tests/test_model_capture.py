"""Whole fused models under export, tracing and torch.compile: what captures the original captures the same."""

import pytest
import torch
from support.models import hidden_states, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from test_tools import experts_model
from torch import nn

from hf_swiglu import patch_model

every_setting = pytest.mark.parametrize("setting", [{}, {"keep": 0}, {"tile": 16}], ids=str)


def one_layer(build=tiny_llama):
    return lambda: build(num_hidden_layers=1)


MODELS = {"llama": one_layer(), "phi3": one_layer(tiny_phi3), "experts": experts_model}


class Logits(nn.Module):
    """Tracers take and return tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def pair(build, setting):
    """The original and the fused model."""
    models = build(), build()
    patch_model(models[1], **setting)
    return models


def ids():
    return tokens() % 64


def error_of(capture, model):
    with pytest.raises(Exception) as caught:
        capture(model)
    return caught.type


@pytest.mark.long
@pytest.mark.parametrize("name, setting", [("llama", {}), ("phi3", {"keep": 0}), ("experts", {})], ids=str)
def test_export(name, setting):
    build = MODELS[name]
    programs = [torch.export.export(Logits(model), (ids(),), strict=False) for model in pair(build, setting)]
    targets = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert targets[1] == targets[0]
    torch.testing.assert_close(programs[1].module()(ids()), build()(ids()).logits)


@pytest.mark.long
def test_export_with_any_number_of_tokens():
    length = torch.export.Dim("length", min=2, max=512)
    for model in pair(one_layer(), {"keep": 0}):
        program = torch.export.export(Logits(model), (ids(),), dynamic_shapes=({1: length},), strict=False)
        for count in (3, 40):
            torch.testing.assert_close(program.module()(ids()[:, :count]), model(ids()[:, :count]).logits)


@every_setting
def test_jit_trace(setting):
    plain, model = pair(one_layer(), setting)
    traced = [torch.jit.trace(Logits(each), ids(), check_trace=False) for each in (plain, model)]
    operators = [sorted(node.kind() for node in each.inlined_graph.nodes()) for each in traced]
    assert operators[1] == operators[0]
    torch.testing.assert_close(traced[1](ids()), plain(ids()).logits)


def test_jit_script_and_fx_refuse_both_alike():
    """They take no model of transformers; `test_tools.py` has them for an MLP."""
    models = pair(one_layer(), {})
    for capture in (torch.jit.script, torch.fx.symbolic_trace):
        assert error_of(capture, models[1]) is error_of(capture, models[0])


def explained(model, **inputs):
    torch._dynamo.reset()
    return torch._dynamo.explain(model)(**inputs)


@pytest.mark.long
@pytest.mark.parametrize("name, setting", [("llama", {"tile": 16}), ("phi3", {}), ("experts", {})], ids=str)
def test_torch_compile_breaks_the_graph_where_it_did(name, setting):
    inputs = {"input_ids": ids(), "labels": ids()}
    plain, model = (explained(each.train(), **inputs) for each in pair(MODELS[name], setting))
    assert (model.graph_count, model.graph_break_count) == (plain.graph_count, plain.graph_break_count)
    assert [str(reason.reason) for reason in model.break_reasons] == [str(each.reason) for each in plain.break_reasons]


@pytest.mark.long
def test_compiled_training_steps_are_the_originals():
    """Ahead-of-time graphs of forward and backward, for any length; `test_compiled_memory.py` has all settings."""
    plain, model = pair(one_layer(), {"keep": 0})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (40, 33):
        inputs = {"input_ids": tokens()[:, :count], "labels": tokens()[:, :count]}
        expected = outcome(plain, **inputs)
        actual = outcome(lambda **keywords: compiled(**keywords), of=model, **inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("setting", [{}, {"keep": 0}], ids=str)
def test_compiled_autograd(setting):
    """Backward alone is compiled, with the hooks and the nodes of the fused product in it."""
    from torch._dynamo import compiled_autograd

    def result(mlp):
        torch._dynamo.reset()
        x = hidden_states().requires_grad_()
        output = mlp(x).square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            output.backward()
        return [x.grad, *(parameter.grad for parameter in mlp.parameters())]

    plain, model = pair(one_layer(), setting)
    torch.testing.assert_close(result(model.model.layers[0].mlp), result(plain.model.layers[0].mlp))
