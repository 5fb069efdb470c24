"""Parametrisations and pruning of the projections of fused models, and the settings that may not apply to them."""

import pytest
import torch
from support.models import fused, tiny_llama, tokens
from support.outcome import outcome
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.testing import counted_launches

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
# Each with whether the patch comes before the parametrisation.
SETTINGS = [({}, True), ({}, False), ({"keep": 1}, False), ({"keep": 0}, True), ({"tile": 48}, False)]


def hooked_weight_norm(projection):
    with pytest.warns(FutureWarning):
        weight_norm(projection)


def orthogonal(projection):
    # The default, a matrix exponential, takes seconds.
    parametrizations.orthogonal(projection, orthogonal_map="householder")


def pruned(projection):
    prune.random_unstructured(projection, "weight", 0.5)


def prune_rows(projection):
    prune.ln_structured(projection, "weight", 0.25, n=2, dim=0)


# How to put each on a projection, and how to take it away.
CHANGES = {
    "weight_norm": (parametrizations.weight_norm, lambda each: remove_parametrizations(each, "weight")),
    "hooked_weight_norm": (hooked_weight_norm, remove_weight_norm),
    "hooked_spectral_norm": (spectral_norm, remove_spectral_norm),
    "spectral_norm": (parametrizations.spectral_norm, lambda each: remove_parametrizations(each, "weight")),
    "orthogonal": (orthogonal, lambda each: remove_parametrizations(each, "weight")),
    "pruned": (pruned, lambda each: prune.remove(each, "weight")),
    "pruned_rows": (prune_rows, lambda each: prune.remove(each, "weight")),
}


def each_projection(model, change):
    torch.manual_seed(1)
    for layer in model.model.layers:
        for name in PROJECTIONS:
            change(getattr(layer.mlp, name))


@pytest.mark.parametrize("setting, patch_first", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_projections_are_changed_as_in_the_original(name, setting, patch_first):
    put, take_away = CHANGES[name]
    seen = []
    for patch in (False, True):
        model = tiny_llama(num_hidden_layers=1).train()
        if patch and patch_first:
            patch_model(model, **setting)
        each_projection(model, put)
        if patch and not patch_first:
            patch_model(model, **setting)
        with counted_launches() as launches:
            # Twice: the spectral norm's vectors are updated by each call in training.
            results = [outcome(model, input_ids=tokens(seed), labels=tokens(seed)) for seed in (1, 2)]
        each_projection(model, take_away)
        seen.append([*results, model(tokens()).logits.detach()])
    assert "swiglu_bwd" in launches.names
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert fused(model) == 1 and unpatch_model(model) == 1
