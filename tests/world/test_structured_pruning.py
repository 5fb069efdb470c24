"""torch-pruning follows a patched MLP's graph: channels of gate, up and down are removed together."""

import pytest
import torch
import torch_pruning
from support.models import tiny_llama, tokens

from hf_swiglu import patch_model

SETTINGS = [{"keep": 3}, {"keep": 2}, {"keep": 1}, {"keep": 0}, {"tile": 4}]


def pruned(model):
    """The sizes of the first MLP's weights after three of its columns were removed, and the logits."""
    model.eval()
    mlp = model.model.layers[0].mlp
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, example_inputs=tokens(), forward_fn=lambda model, ids: model(ids).logits)
    group = graph.get_pruning_group(mlp.down_proj, torch_pruning.prune_linear_in_channels, idxs=[2, 6, 9])
    assert graph.check_pruning_group(group)
    group.prune()
    sizes = [child.weight.shape for child in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    return sizes, model(tokens()).logits


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_columns_are_removed_from_all_three_projections(setting):
    sizes, logits = pruned(tiny_llama())
    model = tiny_llama()
    wide = model.model.layers[0].mlp.up_proj.out_features
    assert len(patch_model(model, **setting).fused) == 2
    found, patched_logits = pruned(model)
    assert found == sizes and sizes[0][0] == wide - 3
    torch.testing.assert_close(patched_logits, logits)
