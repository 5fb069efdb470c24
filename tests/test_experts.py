"""Mixtures of experts, and the clamped members of the family, before and after fusion."""

import copy

import pytest
import torch
from support.kernel import launched, needs_kernel
from support.models import VOCABULARY
from support.outcome import outcome
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.testing import assert_close, counted_launches
from tools.model_support.comparison import EXPERTS_IMPLEMENTATIONS

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {"mixtral": (MixtralConfig, MixtralForCausalLM), "gpt_oss": (GptOssConfig, GptOssForCausalLM)}


def build(name, implementation, **options):
    config, model = MODELS[name]
    torch.manual_seed(0)
    built = model(config(**SIZES | options))
    built.config._experts_implementation = implementation
    for parameter in built.parameters():
        # Wide enough that GPT-OSS's limits of 7 are reached.
        nn.init.normal_(parameter, std=0.4)
    return built


def observe(model):
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    return outcome(model, input_ids=ids, labels=ids)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_compute_the_same_under_every_implementation(name, implementation):
    model = build(name, implementation)
    eager = observe(model)
    # No float64 for grouped_mm; the eager loop is the same function.
    exact_model = build(name, "eager").double()
    exact = observe(exact_model)
    report = patch_model(model)
    assert [entry.kind for entry in report.fused] == ["experts"] * 2
    with counted_launches() as launches:
        fused = observe(model)
    assert set(launches.names) == set(launched("swiglu_fwd", "swiglu_bwd"))
    assert_close(fused, eager, exact)
    assert unpatch_model(model) == 2
    with counted_launches() as launches:
        observe(model)
    assert not launches.names


@needs_kernel
def test_experts_keep_one_packed_buffer_for_backward():
    model = build("mixtral", "batched_mm")
    experts = model.model.layers[0].mlp.experts
    patch_model(model)
    packed = torch.randn(80, 2048, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        experts._apply_gate(packed)
    assert [tensor.shape for tensor in kept] == [packed.shape]


def test_another_activation_among_the_experts_is_named():
    report = patch_model(build("mixtral", "eager", hidden_act="gelu"), strict=False)
    assert not report.fused and all("GELUActivation" in entry.reason for entry in report.skipped)
    assert len(report.skipped) == 2


def test_limits_are_those_of_each_module():
    later = "transformers.models.step3p7.modeling_step3p7"
    step3p7 = pytest.importorskip(later, reason="these experts came later")

    def experts(limit):
        module = step3p7.Step3p7Experts.__new__(step3p7.Step3p7Experts)
        nn.Module.__init__(module)
        module.act_fn, module.limit = ACT2FN["silu"], limit
        module.gate_up_proj = nn.Parameter(torch.empty(1, 2, 2))
        return module

    model = nn.ModuleList([experts(0.5), experts(2.0), experts(0.5)])
    untouched = copy.deepcopy(model)
    report = patch_model(model)
    assert len(report.fused) == 3
    gate_up = torch.randn(80, 512, dtype=torch.float64) * 4
    for module, plain in zip(model, untouched):
        torch.testing.assert_close(module._apply_gate(gate_up), plain._apply_gate(gate_up))


class Looping(nn.Module):
    """Experts in a loop that no trace can follow, with the activation as a child or as a plain function."""

    def __init__(self, activation):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(64, 2048) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(1024, 64) for _ in range(3))
        self.activation = activation

    def forward(self, x):
        for row in range(len(x)):
            if x[row].sum() > 0:
                gate, up = self.up[row](x[row]).chunk(2, dim=-1)
                x = x.index_add(0, torch.tensor([row]), self.down[row](self.activation(gate) * up)[None])
        return x


@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.functional.silu, ACT2FN["swiglu"]], ids=["child", "function", "swiglu"]
)
def test_a_product_in_a_loop_is_fused(activation):
    torch.manual_seed(0)
    module = Looping(activation)
    x = torch.randn(3, 40, 64) + 0.1
    eager, exact = outcome(module, x), outcome(copy.deepcopy(module).double(), x.double())
    (entry,) = patch_model(module, verify=True)
    assert (entry.verdict, entry.kind) == ("fused", "packed")
    with counted_launches() as launches:
        fused = outcome(module, x)
    assert set(launches.names) == set(launched("swiglu_fwd", "swiglu_bwd"))
    assert_close(fused, eager, exact)
    # Another activation is called, whatever it is.
    module.activation = torch.tanh if activation is nn.functional.silu else nn.Tanh()
    with counted_launches() as launches:
        assert not torch.equal(module(x), eager["output"])
    assert not launches.names


def test_an_activation_that_is_used_in_other_ways_too():
    class Used(Looping):
        def forward(self, x):
            activated = self.activation(x)
            for row in range(3):
                gate, up = self.up[row](x).chunk(2, dim=-1)
                activated = activated + self.down[row](self.activation(gate) * up)
            return activated + self.activation(x)

    module, x = Used(nn.SiLU()), torch.randn(40, 64)
    expected = module(x)
    (entry,) = patch_model(nn.Sequential(module))
    assert entry.verdict == "fused"
    torch.testing.assert_close(module(x), expected)


def test_experts_without_a_gate_are_not_reported():
    later = "transformers.models.nemotron_h.modeling_nemotron_h"
    nemotron_h = pytest.importorskip(later, reason="these experts came later")
    config = nemotron_h.NemotronHConfig(
        layers_block_type=["moe"], hidden_size=32, n_routed_experts=4, moe_intermediate_size=64, mlp_hidden_act="silu"
    )
    experts = nemotron_h.NemotronHExperts(config)
    assert experts.has_gate is False
    assert not patch_model(nn.Sequential(experts), strict=False)


def test_a_hook_on_the_experts_activation_still_fires():
    model = build("mixtral", "eager")
    seen = []
    expected = observe(model)
    patch_model(model)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, MixtralExperts)
    experts.act_fn.register_forward_hook(lambda module, args, output: seen.append(output))
    with counted_launches():
        torch.testing.assert_close(observe(model)["logits"], expected["logits"])
    assert seen
