"""Fused models in DDP and FSDP2, over gloo: two processes compute what one does."""

import copy

import pytest
import torch
import torch.distributed as dist
from support.kernel import launched
from support.models import GatedMLP, tiny_llama, tokens
from support.outcome import outcome
from support.processes import free_port, join
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")


@pytest.fixture
def group():
    join(0, 1, free_port())
    yield
    dist.destroy_process_group()


def _gradients(model, ids):
    """Without the outputs: two processes have a half of them each."""
    shown = outcome(model, input_ids=ids, labels=ids)
    return {name: tensor for name, tensor in shown.items() if name.startswith("gradient")}


def _compare_ddp(rank: int, patch_first: bool) -> None:
    model = tiny_llama().double()
    expected = _gradients(copy.deepcopy(model), tokens())
    if patch_first:
        patch_model(model)
    model = DistributedDataParallel(model)
    if not patch_first:
        patch_model(model)
    assert sum(isinstance(module, FusedModule) for module in model.modules()) == 2
    # Each of two processes has one of the two sequences; DDP averages the gradients of their mean losses.
    torch.testing.assert_close(_gradients(model, tokens()[rank : rank + 1]), expected)
    assert unpatch_model(model) == 2


def _ddp_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    join(rank, 2, port)
    try:
        # DDP's models go before the group. One that outlives it joins gloo's threads while holding the GIL they may
        # wait for: 5 runs of 22 never ended, without this package too. https://github.com/pytorch/pytorch/issues/56297
        for patch_first in (True, False):
            _compare_ddp(rank, patch_first)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_of_ddp_compute_the_gradients_of_one():
    torch.multiprocessing.spawn(_ddp_rank, (free_port(),), nprocs=2)


def _shard(model, units):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer.mlp if units == "mlp" else layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("units", ["mlp", "layer"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch_then_shard", "shard_then_patch"])
def test_fsdp2(group, units, patch_first):
    model = tiny_llama()
    reference = copy.deepcopy(model)
    patch_model(reference)
    expected = _gradients(reference, tokens())
    if patch_first:
        patch_model(model)
    _shard(model, units)
    if not patch_first:
        assert len(patch_model(model).fused) == 2
    with counted_launches() as launches:
        gradients = _gradients(model, tokens())
    assert launches.names.count("swiglu_bwd") == len(launched("swiglu_bwd") * 2)
    torch.testing.assert_close(gradients, expected)


def test_undo_of_a_model_that_was_sharded_since_is_refused(group):
    model = nn.ModuleList([GatedMLP(), GatedMLP()])
    patch_model(model)
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(
        RuntimeError, match=r"unpatch_model: 1 was wrapped as \w+ by FSDPModule after it was fused.*before wrapping"
    ):
        unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes


def test_undo_of_a_model_that_was_sharded_before(group):
    model = nn.ModuleList([GatedMLP(), GatedMLP()])
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    classes = [type(module) for module in model.modules()]
    patch_model(model)
    assert unpatch_model(model) == 2
    assert [type(module) for module in model.modules()] == classes
