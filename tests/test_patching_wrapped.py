"""Fused models inside what people wrap around models, put on before the patch or after it."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from support.kernel import HAS_KERNEL, launched
from support.models import GatedMLP, fused, hidden_states, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from torch import nn

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.testing import counted_launches


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["q_proj", "gate_proj"]])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch_then_lora", "lora_then_patch"])
def test_peft_lora(targets, patch_first):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(target_modules=targets, lora_dropout=0.1)

    def adapted(patch):
        model = tiny_llama().double()
        if patch and patch_first:
            patch_model(model)
        model = peft.get_peft_model(model, config).train()
        if patch and not patch_first:
            patch_model(model)
        # LoRA starts at zero, which would hide a bypassed adapter.
        generator = torch.Generator().manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        return model

    patched, plain = adapted(True), adapted(False)
    result = outcome(patched, input_ids=tokens(), labels=tokens())
    # Each of the two layers has two new matrices for each target; the loss and the logits are shown too.
    assert fused(patched) == 2 and len(result) == 2 * 2 * len(targets) + 2
    torch.testing.assert_close(result, outcome(plain, input_ids=tokens(), labels=tokens()))
    for model in (patched, plain):
        model.eval()
    torch.testing.assert_close(
        patched.merge_and_unload()(tokens()).logits.detach(), plain.merge_and_unload()(tokens()).logits.detach()
    )


def _on_devices(model, folder):
    """LLaMA with a layer on the CPU and another on disk, its weights fetched for each call."""
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def _cpu_offloaded(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def _disk_offloaded(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


OFFLOADS = pytest.mark.parametrize("offload", [_on_devices, _cpu_offloaded, _disk_offloaded])


@OFFLOADS
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch_then_hook", "hook_then_patch"])
@torch.no_grad()
def test_accelerate_offload(offload, patch_first, tmp_path):
    model = tiny_llama()
    expected = copy.deepcopy(model)
    patch_model(expected)
    expected = expected(tokens()).logits
    eager = model(tokens()).logits
    if patch_first:
        patch_model(model)
    model = offload(model, tmp_path)
    if not patch_first:
        assert len(patch_model(model, verify=True).fused) == 2
    assert next(model.model.layers[1].mlp.parameters()).is_meta
    with counted_launches() as launches:
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=0)
    assert launches.names == launched("swiglu_fwd") * 2
    # Undo under the hooks: the hooks stay, the forward is the original's again.
    assert unpatch_model(model) == 2
    with counted_launches() as launches:
        torch.testing.assert_close(model(tokens()).logits, eager, rtol=0, atol=0)
    assert launches.names == []


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch_then_hook", "hook_then_patch"])
@torch.no_grad()
def test_accelerates_hooks_can_come_and_go(patch_first):
    model = tiny_llama()
    eager = model(tokens()).logits
    if patch_first:
        patch_model(model)
    remove_hook_from_submodules(accelerate.cpu_offload(model, execution_device="cpu"))
    report = patch_model(model)
    assert len(report.already_fused if patch_first else report.fused) == 2
    with counted_launches() as launches:
        model(tokens())
    assert launches.names == launched("swiglu_fwd") * 2
    assert unpatch_model(model) == 2
    with counted_launches() as launches:
        torch.testing.assert_close(model(tokens()).logits, eager, rtol=0, atol=0)
    assert launches.names == []


def test_a_forward_replaced_on_the_instance_is_left_alone():
    model = nn.Sequential(GatedMLP(), GatedMLP())
    model[0].forward = lambda x: x * 2
    report = patch_model(model)
    assert [entry.verdict for entry in report] == ["skipped", "fused"]
    assert "replaced on the instance" in report[0].reason
    torch.testing.assert_close(model[0](hidden_states()), hidden_states() * 2)
    # As Liger's patch of a model that was fused before: it is no longer fused, and a second report says so.
    model[1].forward = lambda x: x * 3
    report = patch_model(model, strict=False)
    assert [entry.verdict for entry in report] == ["skipped", "skipped"]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_gradient_checkpointing(build, use_reentrant):
    results = []
    for patch in (False, True):
        model = build().double().train()
        if patch:
            patch_model(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        results.append(outcome(model, input_ids=tokens(), labels=tokens()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_greedy_generation_is_identical(build):
    model = build()
    prompt = torch.cat([tokens(seed) for seed in range(3)])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options)
    patch_model(model)
    with counted_launches() as launches:
        assert torch.equal(model.generate(prompt, **options), expected)
    assert bool(launches) is HAS_KERNEL, "the prompt is long enough for a kernel"


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_torch_compile_sees_one_graph_without_our_operators(build):
    model = build()
    patch_model(model)
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=collect)(tokens()).logits
    torch.testing.assert_close(compiled, model(tokens()).logits)
    # What is recomputed for backward is a graph of its own inside.
    code = "".join(graph.code for graph in graphs[0].modules() if hasattr(graph, "code"))
    assert len(graphs) == 1 and "silu" in code and "hf_swiglu" not in code


@pytest.mark.slow
def test_torch_compile_with_inductor():
    mlp = GatedMLP()
    patch_model(nn.Sequential(mlp))
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True)
        torch.testing.assert_close(compiled(hidden_states()), GatedMLP.forward(mlp, hidden_states()))


class QuantisedLinear(nn.Module):
    """As bitsandbytes' and others': integer weights that forward turns back into floats, and no `weight` to read."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("verify", [False, True])
@torch.no_grad()
def test_quantised_projections(verify):
    model = tiny_llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, QuantisedLinear(getattr(layer.mlp, name)))
    expected = copy.deepcopy(model).double()(tokens()).logits
    assert len(patch_model(model, verify=verify).fused) == 2
    with counted_launches() as launches:
        model(tokens())
    assert launches.names == launched("swiglu_fwd") * 2
    torch.testing.assert_close(model.double()(tokens()).logits, expected)
