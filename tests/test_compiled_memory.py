"""keep under torch.compile: what the joint graph of forward and backward saves, in buffers, without a graph break."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from support.models import WIDE, hidden_states
from test_keep import assert_close, gemma, phi3, run_and_differentiate
from test_memory import llama
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from hf_swiglu import patch_model


def compiled(mlp):
    """The module compiled with Inductor's partitioner, and what its forward hands on to backward."""
    torch._dynamo.reset()
    saved = []

    def forward(graph, inputs):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        saved.extend(node for node in output.args[0] if node.op != "placeholder")
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    return torch.compile(mlp, fullgraph=True, backend=backend), saved


def buffers(saved) -> float:
    elements = hidden_states().numel() // hidden_states().shape[-1] * WIDE
    values = [node.meta["val"] for node in saved]
    return sum(value.numel() for value in values if value.shape[-1] in (WIDE, 2 * WIDE)) / elements


# keep=1 is treated as keep=0 here.
SETTINGS = [({"keep": 3}, 3), ({}, 2), ({"keep": 1}, 0), ({"keep": 0}, 0), ({"tile": 16}, 0)]


@pytest.mark.parametrize("setting, expected", SETTINGS, ids=str)
@pytest.mark.parametrize("build", [llama, phi3], ids=["llama", "phi3"])
def test_buffers_that_the_compiled_forward_saves(build, setting, expected):
    torch.manual_seed(0)
    mlp = build()
    patched = copy.deepcopy(mlp)
    patch_model(patched, **setting)
    run, saved = compiled(patched)
    results = run_and_differentiate(patched, lambda _, x: run(x))
    # keep=1 is not possible for gate and up in one tensor.
    assert buffers(saved) == (2 if build is phi3 and setting == {"keep": 1} else expected)
    assert_close(results, run_and_differentiate(mlp))


def test_a_gate_with_another_activation():
    mlp = gemma()
    patch_model(mlp, keep=0)
    run, saved = compiled(mlp)
    run_and_differentiate(mlp, lambda _, x: run(x))
    assert buffers(saved) == 0


def test_without_gradients_there_is_nothing_to_recompute():
    mlp = llama()
    expected = mlp(hidden_states()).detach()
    patch_model(mlp, keep=0)
    run, _ = compiled(mlp)
    with torch.no_grad():
        torch.testing.assert_close(run(hidden_states()), expected)
