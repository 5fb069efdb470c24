"""Modules of unknown classes: each is fused and computes the same, or is skipped with a reason."""

import copy
import itertools

import pytest
import torch
from support.lookalikes import LOOKALIKES
from support.models import hidden_states
from support.outcome import outcome
from torch import nn

from hf_swiglu import patch_model
from hf_swiglu.patching.classes import FusedModule
from hf_swiglu.testing import assert_close


def outcome_and_input(module, differentiated):
    """The outcome of one call, with what the call made of its input among the outputs."""

    def call(x):
        # A leaf that requires a gradient could not be written to.
        handed = x * 1
        result = module(handed)
        return *(result if isinstance(result, tuple) else (result,)), handed

    x = hidden_states(next(module.parameters()).dtype)
    return outcome(call, x, of=module, differentiated=differentiated)


def attributes(module):
    return [*vars(module), len(getattr(module, "seen", ()))]


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
        torch.testing.assert_close(outcome_and_input(module, grad), outcome_and_input(untouched, grad))
        assert attributes(module) == attributes(untouched)


@pytest.mark.parametrize("lookalike, verdict", LOOKALIKES.values(), ids=LOOKALIKES)
def test_the_same_with_kernels_and_without_gradients(lookalike, verdict):
    # Where the product is written over the gate, if anywhere.
    torch.manual_seed(0)
    module = lookalike().eval()
    untouched = copy.deepcopy(module)
    if not patch_model(nn.Sequential(module), strict=False).fused:
        return
    exact = outcome_and_input(copy.deepcopy(untouched).double(), False)
    assert_close(outcome_and_input(module, False), outcome_and_input(untouched, False), exact)
