"""Whole fused models under export, tracing and torch.compile: what captures the original captures the same."""

import pytest
import torch
from support.models import hidden_states, tiny_gemma, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from test_tools import experts_model
from torch import nn

from hf_swiglu import patch_model

SETTINGS = [{}, {"keep": 3}, {"keep": 1}, {"keep": 0}, {"tile": 16}]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
every_model = pytest.mark.parametrize("build", [tiny_llama, tiny_phi3, experts_model])


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


def error_of(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.type


@pytest.mark.slow
@every_setting
@every_model
def test_export(build, setting):
    programs = [torch.export.export(Logits(model), (ids(),), strict=False) for model in pair(build, setting)]
    targets = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert targets[1] == targets[0]
    torch.testing.assert_close(programs[1].module()(ids()), build()(ids()).logits)


@pytest.mark.slow
def test_export_with_any_number_of_tokens():
    length = torch.export.Dim("length", min=2, max=512)
    for model in pair(tiny_llama, {"keep": 0}):
        program = torch.export.export(Logits(model), (ids(),), dynamic_shapes=({1: length},), strict=False)
        for count in (3, 40):
            torch.testing.assert_close(program.module()(ids()[:, :count]), model(ids()[:, :count]).logits)


@pytest.mark.slow
@every_setting
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_jit_trace(build, setting):
    model = pair(build, setting)[1]
    traced = torch.jit.trace(Logits(model), ids(), check_trace=False)
    assert "swiglu" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(ids()), build()(ids()).logits)


def test_jit_script_and_fx_refuse_both_alike():
    """They take no model of transformers; `test_tools.py` has them for an MLP."""
    models = pair(tiny_llama, {})
    for capture in (torch.jit.script, torch.fx.symbolic_trace):
        assert error_of(lambda: capture(models[1])) is error_of(lambda: capture(models[0]))


def explained(model, **inputs):
    torch._dynamo.reset()
    return torch._dynamo.explain(model)(**inputs)


@pytest.mark.slow
@every_setting
@every_model
def test_torch_compile_breaks_the_graph_where_it_did(build, setting):
    inputs = {"input_ids": ids(), "labels": ids()}
    plain, model = (explained(each.train(), **inputs) for each in pair(build, setting))
    assert (model.graph_count, model.graph_break_count) == (plain.graph_count, plain.graph_break_count)
    assert [str(reason.reason) for reason in model.break_reasons] == [str(each.reason) for each in plain.break_reasons]


@pytest.mark.slow
@every_setting
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_compiled_training_steps_are_the_originals(build, setting):
    """Ahead-of-time graphs of forward and backward, with dynamic lengths; Gemma's gates have another activation."""
    plain, model = build(), build()
    patch_model(model, strict=False, **setting)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (40, 33):
        inputs = {"input_ids": tokens()[:, :count], "labels": tokens()[:, :count]}
        expected = outcome(plain, **inputs)
        actual = outcome(lambda **keywords: compiled(**keywords), of=model, **inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_setting
def test_compiled_autograd(setting):
    """Backward alone is compiled, with the hooks and the nodes of the fused products in it."""
    from torch._dynamo import compiled_autograd

    def result(model):
        torch._dynamo.reset()
        x = hidden_states().requires_grad_()
        output = model(inputs_embeds=x, labels=tokens()).loss
        with compiled_autograd._enable(torch.compile(backend="eager")):
            output.backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    plain, model = pair(tiny_llama, setting)
    torch.testing.assert_close(result(model), result(plain), rtol=1e-4, atol=1e-5)
