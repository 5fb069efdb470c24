"""What the patcher finds in real models, and what it leaves alone with a reason."""

import collections
import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.models import HIDDEN, GatedMLP, hidden_states, tiny_gemma, tiny_gpt2, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_swiglu import patch_model
from hf_swiglu.patching import methods
from hf_swiglu.patching.classes import FusedModule


@pytest.mark.parametrize("build, kind", [(tiny_llama, "separate"), (tiny_phi3, "packed")])
def test_every_mlp_of_a_silu_model_is_fused_and_nothing_else_is_mentioned(build, kind):
    model = build()
    report = patch_model(model)
    assert [(entry.name, entry.verdict, entry.kind) for entry in report] == [
        (f"model.layers.{layer}.mlp", "fused", kind) for layer in range(2)
    ]
    assert [name for name, module in model.named_modules() if isinstance(module, FusedModule)] == [
        entry.name for entry in report
    ]


def test_gelu_is_skipped_by_the_activations_name():
    model = tiny_gemma()
    report = patch_model(model, strict=False)
    assert len(report.skipped) == len(report) == 2
    assert all("GELU" in entry.reason and "not SiLU" in entry.reason for entry in report)
    assert not any(isinstance(module, FusedModule) for module in model.modules())
    with pytest.raises(ValueError, match="GELU"):
        patch_model(model)


def test_a_model_without_a_gated_mlp():
    with pytest.raises(ValueError, match=r"nothing to fuse in GPT2LMHeadModel.*strict=False"):
        patch_model(tiny_gpt2())
    assert list(patch_model(tiny_gpt2(), strict=False)) == []


def test_attention_is_no_skipped_mlp():
    class GatedAttention(nn.Module):
        """Four projections and an activation, but no product of two of them."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
            self.o = nn.Linear(HIDDEN, HIDDEN)
            self.act = nn.SiLU()

        def forward(self, x):
            return self.o(self.act(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))

    report = patch_model(nn.Sequential(GatedAttention(), GatedMLP()))
    assert [(entry.name, entry.verdict) for entry in report] == [("1", "fused")]


def test_biases():
    model = tiny_llama(mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.bias.normal_()
    untouched = copy.deepcopy(model)
    assert len(patch_model(model).fused) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, untouched(tokens()).logits)


def test_an_mlp_shared_by_two_layers_is_reported_once_and_fused_for_both():
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    report = patch_model(model)
    assert [entry.name for entry in report] == ["model.layers.0.mlp"]
    assert isinstance(model.model.layers[1].mlp, FusedModule)


def _tie(mlp):
    mlp.w3.weight = mlp.w1.weight


def _share_the_projection(mlp):
    mlp.w3 = mlp.w1


def _freeze_gate(mlp):
    mlp.w1.requires_grad_(False)


def _freeze_up(mlp):
    mlp.w3.requires_grad_(False)


def _freeze_all(mlp):
    mlp.requires_grad_(False)


@pytest.mark.parametrize("change", [_tie, _share_the_projection, _freeze_gate, _freeze_up, _freeze_all])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["input_with_grad", "input_without"])
def test_tied_and_frozen_projections(change, needs_grad):
    mlp = GatedMLP().double()
    change(mlp)
    untouched = copy.deepcopy(mlp)
    patch_model(nn.Sequential(mlp))
    x = hidden_states(torch.float64)
    results = [outcome(module, x, train_inputs=needs_grad) for module in (mlp, untouched)]
    torch.testing.assert_close(*results)


def _set_scale(mlp):
    mlp.scale = 0.25


def _set_count(mlp):
    mlp.count = 5


def _set_limit(mlp):
    mlp.limit = 0.05


def _set_flag(mlp):
    mlp.enabled.fill_(True)


class Adjustable(GatedMLP):
    """Reads everything that can be changed after construction."""

    def __init__(self):
        super().__init__()
        self.scale, self.count, self.limit = 0.5, 2, 0.2
        self.register_buffer("enabled", torch.tensor(False))


class Scaled(Adjustable):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.scale


class Counted(Adjustable):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.count


class Limited(Adjustable):
    def forward(self, x):
        return self.w2(self.act(self.w1(x).clamp(max=self.limit)) * self.w3(x).clamp(-self.limit, self.limit))


class Switched(Adjustable):
    def forward(self, x):
        product = self.act(self.w1(x)) * self.w3(x)
        return self.w2(-product if self.enabled else product)


@pytest.mark.parametrize(
    "cls, change", [(Scaled, _set_scale), (Counted, _set_count), (Limited, _set_limit), (Switched, _set_flag)]
)
def test_an_attribute_that_changes_after_patching_takes_effect(cls, change):
    mlp = cls().double()
    untouched = copy.deepcopy(mlp)
    patch_model(nn.Sequential(mlp), strict=False)
    for module in (mlp, untouched):
        change(module)
    with torch.no_grad():
        torch.testing.assert_close(mlp(hidden_states(torch.float64)), untouched(hidden_states(torch.float64)))


class ByProperty(GatedMLP):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    @property
    def doubled(self):
        return self.mode == 1

    def forward(self, x):
        product = self.act(self.w1(x)) * self.w3(x)
        return self.w2(product * 2 if self.doubled else product)


def _is_doubled(module):
    return module.mode == 1


class ByHelper(ByProperty):
    def forward(self, x):
        product = self.act(self.w1(x)) * self.w3(x)
        return self.w2(product * 2 if _is_doubled(self) else product)


@pytest.mark.parametrize("cls", [ByProperty, ByHelper])
def test_two_configurations_of_one_class_are_kept_apart(cls):
    model = nn.ModuleList([cls(0), cls(1), cls(0)]).double()
    untouched = copy.deepcopy(model)
    patch_model(model, strict=False)
    x = hidden_states(torch.float64)
    with torch.no_grad():
        for mine, theirs in zip(model, untouched):
            torch.testing.assert_close(mine(x), theirs(x))


class PreciseSiLU(nn.SiLU):
    def forward(self, x):
        return super().forward(x.double()).to(x.dtype)


class Leaky(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


def my_silu(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (PreciseSiLU(), "PreciseSiLU"),
        (Leaky(), "Leaky"),
        (my_silu, "my_silu"),
        (nn.SiLU(inplace=True), "SiLU in place"),
    ],
)
def test_an_activation_of_the_users_own_is_named(activation, name):
    mlp = GatedMLP()
    del mlp.act
    mlp.act = activation
    before = mlp(hidden_states())
    (entry,) = patch_model(nn.Sequential(mlp), strict=False)
    assert entry.verdict == "skipped" and name in entry.reason
    with pytest.raises(ValueError, match=name):
        patch_model(nn.Sequential(mlp))
    torch.testing.assert_close(mlp(hidden_states()), before)


def test_126_layers_on_meta_are_read_once_and_fused_without_weights(monkeypatch):
    read = collections.Counter()
    analyse = methods._analyse

    def counting(function):
        read[function.__qualname__] += 1
        return analyse(function)

    monkeypatch.setattr(methods, "_analyse", counting)
    monkeypatch.setattr(methods, "_analyses", weakref.WeakKeyDictionary())
    config = LlamaConfig(num_hidden_layers=126, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert len(patch_model(model).fused) == 126
    assert len({type(layer.mlp) for layer in model.model.layers}) == 1
    assert read["LlamaMLP.forward"] == 1 and max(read.values()) == 1, read
