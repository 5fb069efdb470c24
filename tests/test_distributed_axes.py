"""Several kinds of parallelism at once, over gloo: fused models compute what one process does with an unpatched one."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from support.models import fused, tiny_llama, tokens
from support.processes import free_port, join, leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_swiglu import patch_model
from hf_swiglu.testing import counted_launches, kernels_at_every_size

pytestmark = [
    pytest.mark.long,
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo"),
]

STEPS = 4
PROJECTIONS = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}


def with_lora(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["norm", "mlp"])
    return peft.get_peft_model(model, config)


def losses(model, parts):
    """Of a few steps, each with the mean of the parts' losses."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1, foreach=False)
    result = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(model(input_ids=part, labels=part).loss for part in parts(step)) / len(parts(step))
        loss.backward()
        optimizer.step()
        result.append(loss.detach())
    return torch.stack(result)


def halves(step):
    ids = tokens(step)
    return [ids[:1], ids[1:]]


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def _compare_on_mesh(mesh, setting, adapted):
    """Two groups have a sequence each; within a group each process has half of every MLP's features."""
    model = with_lora(tiny_llama()) if adapted else tiny_llama()
    checkpointed(model)
    plain, untrained = copy.deepcopy(model), copy.deepcopy(model)
    expected = losses(plain, halves)
    patch_model(model, **setting)
    for layer in (model.get_base_model() if adapted else model).model.layers:
        mlp = layer.mlp.modules_to_save["default"] if adapted else layer.mlp
        parallelize_module(mlp, mesh["features"], PROJECTIONS)
        assert mlp.gate_proj.weight.to_local().shape[0] == model.config.intermediate_size // 2
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    group = mesh.get_local_rank("data")
    with counted_launches() as launches, kernels_at_every_size():
        mean = losses(model, lambda step: halves(step)[group : group + 1])
    assert fused(model) >= 2 and "swiglu_bwd" in launches.names
    dist.all_reduce(mean, group=mesh.get_group("data"))
    torch.testing.assert_close(mean / 2, expected)
    for ours, theirs, before in zip(model.parameters(), plain.parameters(), untrained.parameters(), strict=True):
        if theirs.requires_grad:
            change = theirs.detach() - before
            tolerance = {"rtol": 0, "atol": 1e-3 * change.abs().max().item()}
            torch.testing.assert_close(ours.detach().full_tensor() - before, change, **tolerance)


def _mesh_rank(rank, port):
    torch.set_num_threads(1)
    join(rank, 4, port)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "features"))
    # In one start of four processes, which takes longer than what they do.
    for setting in ({}, {"keep": 0}):
        for adapted in (False, True):
            _compare_on_mesh(mesh, setting, adapted)
    leave()


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.8 trains unpatched models otherwise, too",
)
def test_fsdp2_and_tensor_parallelism_with_lora_and_checkpointing():
    torch.multiprocessing.spawn(_mesh_rank, (free_port(),), nprocs=4)


class SometimesUsed(nn.Module):
    """Of the model's MLPs each call leaves one out, another one in each process."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, left_out):
        inner = self.model.model
        x = inner.embed_tokens(ids)
        for at, layer in enumerate(inner.layers):
            if at != left_out:
                x = x + layer.mlp(x)
        return self.model.lm_head(x).square().mean()


def _compare_unused(rank, setting):
    plain = tiny_llama()
    model = SometimesUsed(copy.deepcopy(plain))
    patch_model(model, **setting)
    plain, model = SometimesUsed(plain), DistributedDataParallel(model, find_unused_parameters=True)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Layer 0 or 1, or none, by process and step.
        left_out = [(step + at) % 3 for at in range(2)]
        (sum(map(plain, halves(step), left_out)) / 2).backward()
        with counted_launches() as launches, kernels_at_every_size():
            model(halves(step)[rank], left_out[rank]).backward()
        assert "swiglu_bwd" in launches.names
        for ours, theirs in zip(model.module.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                tolerance = {"rtol": 0, "atol": 1e-4 * theirs.grad.abs().max().item()}
                torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
        for optimizer in optimizers:
            optimizer.step()


def _unused_rank(rank, port):
    torch.set_num_threads(1)
    join(rank, 2, port)
    for setting in ({}, {"keep": 1}, {"tile": 16}):
        _compare_unused(rank, setting)
    leave()


def test_ddp_finds_unused_parameters():
    torch.multiprocessing.spawn(_unused_rank, (free_port(),), nprocs=2)
