"""Modules that nobody has seen before: each is fused and computes the same, or is skipped with a reason."""

import contextlib
import copy
import itertools

import pytest
import torch
from lookalikes import LOOKALIKES
from models import hidden_states
from tolerance import assert_close_to_float64
from torch import nn

from hf_swiglu import patch_model
from hf_swiglu.patching.classes import FusedModule


def _tensors(output):
    return [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]


def _observe(module, grad):
    """Everything that one call shows: outputs, what it did to its input, gradients, attributes."""
    x = hidden_states(next(module.parameters()).dtype).requires_grad_(grad)
    handed = x * 1
    torch.manual_seed(3)
    with contextlib.nullcontext() if grad else torch.no_grad():
        outputs = _tensors(module(handed))
    seen = [*outputs, handed.detach()]
    if outputs[0].requires_grad:
        parameters = [x, *module.parameters()]
        loss = sum(output.pow(2).sum() for output in outputs)
        seen += torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in seen], [*vars(module), len(getattr(module, "seen", ()))]


def _assert_same(observed, expected):
    torch.testing.assert_close(observed[0], expected[0])
    assert observed[1] == expected[1]


@pytest.mark.parametrize("lookalike, verdict", LOOKALIKES.values(), ids=LOOKALIKES)
def test_a_module_computes_the_same_or_is_skipped(lookalike, verdict):
    for training, grad in itertools.product([True, False], [True, False]):
        torch.manual_seed(0)
        # In float64 the plain formula runs, so that nothing but the data flow can make a difference.
        module = lookalike().double().train(training)
        untouched = copy.deepcopy(module)
        # Patched in the other mode, which a trace must not freeze.
        module.train(not training)
        report = patch_model(nn.Sequential(module), strict=False)
        module.train(training)
        assert len(report) == 1, "a module with the parts of a gated MLP is reported, one way or the other"
        assert report[0].verdict == verdict, report
        assert isinstance(module, FusedModule) == bool(report.fused)
        assert report.fused or report[0].reason
        _assert_same(_observe(module, grad), _observe(untouched, grad))


@pytest.mark.parametrize("lookalike, verdict", LOOKALIKES.values(), ids=LOOKALIKES)
def test_the_same_with_kernels_and_without_gradients(lookalike, verdict):
    # Where the product is written over the gate, if anywhere.
    torch.manual_seed(0)
    module = lookalike().eval()
    untouched = copy.deepcopy(module)
    if not patch_model(nn.Sequential(module), strict=False).fused:
        return
    exact, _ = _observe(copy.deepcopy(untouched).double(), False)
    for triple in zip(_observe(module, False)[0], _observe(untouched, False)[0], exact, strict=True):
        assert_close_to_float64(*triple)
