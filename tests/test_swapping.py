"""Swapping the gate's activation: in the model and in its config, so that a reload computes the same."""

import copy
import pickle

import pytest
import torch
from support.kernel import needs_kernel
from support.models import tiny_gemma, tiny_llama, tiny_llava, tokens
from support.outcome import outcome
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaForCausalLM,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers.activations import SiLUActivation

from hf_swiglu import SwiGLU, patch_model, unpatch_model
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches


def _logits(model):
    return outcome(model, input_ids=tokens(), differentiated=False)["logits"]


def _state(model):
    """Classes, attributes and configs: all that a swap touches."""
    modules = [(type(module), list(vars(module))) for module in model.modules()]
    return modules, [module.config.to_dict() for module in model.modules() if hasattr(module, "config")]


def _saved(model, folder):
    """Saves a copy: saving adds entries to the config."""
    copy.deepcopy(model).save_pretrained(folder)
    return folder


def _with_swiglu(model):
    """The same model with the activation put in by hand, to compare with."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(getattr(module, "act_fn", None)) is SiLUActivation:
            module.act_fn = SwiGLU()
    return model


def test_swap_save_reload_and_undo(tmp_path):
    model = tiny_llama().double()
    before, silu, expected = _state(model), _logits(model), _logits(_with_swiglu(model))
    assert not torch.allclose(silu, expected)

    report = patch_model(model, activation="swiglu")
    assert [entry.activation for entry in report.fused] == ["SwiGLU"] * 2
    assert model.config.hidden_act == "swiglu"
    torch.testing.assert_close(_logits(model), expected)

    reloaded = LlamaForCausalLM.from_pretrained(_saved(model, tmp_path))
    assert reloaded.config.hidden_act == "swiglu" and reloaded.dtype == torch.float64
    torch.testing.assert_close(_logits(reloaded), expected)

    assert unpatch_model(model) == 2
    assert _state(model) == before
    torch.testing.assert_close(_logits(model), silu, rtol=0, atol=0)


@needs_kernel
def test_the_swapped_product_runs_on_the_kernel():
    model = tiny_llama()
    patch_model(model, activation="swiglu")
    with counted_launches() as launches:
        _logits(model)
    assert launches.names == ["swiglu_fwd"] * 2 and all(launch.params.power == 2 for launch in launches)


def test_from_pretrained_with_hidden_act_computes_the_same(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    patch_model(model, activation="swiglu")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, hidden_act="swiglu")
    assert len(patch_model(loaded).fused) == 2
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=0)


def test_a_pickle_of_a_swapped_model_needs_no_hf_swiglu_and_can_be_undone():
    model = tiny_llama(hidden_act="gelu")
    before = _state(model)
    patch_model(model, activation="silu")
    data = pickle.dumps(model)
    assert b"hf_swiglu." not in data
    loaded = pickle.loads(data)
    torch.testing.assert_close(_logits(loaded), _logits(model))
    assert unpatch_model(loaded) == 2
    assert _state(loaded) == before


def test_swapping_twice_is_a_no_op():
    model = tiny_llama()
    before = _state(model)
    patch_model(model, activation="swiglu")
    once = _state(model)
    report = patch_model(model, activation="swiglu")
    assert len(report.already_fused) == len(report) == 2 and _state(model) == once
    unpatch_model(model)
    assert _state(model) == before


def test_a_swap_for_what_is_there_fuses_and_edits_nothing():
    model = tiny_llama()
    config = model.config.to_dict()
    assert len(patch_model(model, activation="silu").fused) == 2
    assert model.config.to_dict() == config


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_a_model_that_is_fused_already_is_swapped_and_restored(activation):
    model = tiny_llama(hidden_act="swiglu" if activation == "silu" else "silu")
    before = _state(model)
    expected = _logits(tiny_llama(hidden_act=activation))
    patch_model(model)
    patch_model(model, activation=activation)
    torch.testing.assert_close(_logits(model), expected)
    assert model.config.hidden_act == activation
    unpatch_model(model)
    assert _state(model) == before


def test_one_part_of_a_composite_model_saved_and_reloaded(tmp_path):
    model = tiny_llava().double()
    before, silu = _state(model), _logits(model)
    expected = _logits(_with_swiglu(model))
    assert len(patch_model(model, activation="swiglu").fused) == 2
    assert model.config.text_config.hidden_act == "swiglu" and model.config.vision_config.hidden_act == "quick_gelu"
    reloaded = LlavaForConditionalGeneration.from_pretrained(_saved(model, tmp_path))
    for same in (model, reloaded):
        torch.testing.assert_close(_logits(same), expected)
    unpatch_model(model)
    assert _state(model) == before
    torch.testing.assert_close(_logits(model), silu, rtol=0, atol=0)


def test_a_swap_that_the_config_cannot_express_is_refused():
    model = tiny_llama()
    before, logits = _state(model), _logits(model)
    with pytest.raises(ValueError, match=r"config of LlamaForCausalLM cannot express.*model\.layers\.1\.mlp\.act_fn"):
        patch_model(model, activation="swiglu", only="model.layers.0.mlp")
    assert _state(model) == before
    torch.testing.assert_close(_logits(model), logits, rtol=0, atol=0)


def _tiny_gemma2():
    torch.manual_seed(0)
    sizes = tiny_gemma().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
    names += ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
    return Gemma2ForCausalLM(Gemma2Config(**{name: sizes[name] for name in names})).eval()


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
@pytest.mark.parametrize(
    "build, cls, key",
    [(tiny_gemma, GemmaForCausalLM, "hidden_act"), (_tiny_gemma2, Gemma2ForCausalLM, "hidden_activation")],
)
def test_gemma_becomes_a_swiglu_model(build, cls, key, activation, tmp_path):
    model = build().double()
    before, gelu = _state(model), _logits(model)
    assert len(patch_model(model, activation=activation).fused) == 2
    assert getattr(model.config, key) == activation
    logits = _logits(model)
    assert not torch.allclose(logits, gelu)
    torch.testing.assert_close(_logits(cls.from_pretrained(_saved(model, tmp_path))), logits)
    unpatch_model(model)
    assert _state(model) == before
    torch.testing.assert_close(_logits(model), gelu, rtol=0, atol=0)


class WrittenOut(nn.Module):
    """Calls F.silu, so that no config and no child decides on the activation."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_an_activation_that_the_forward_spells_out_is_refused_and_all_restored():
    model = nn.ModuleList([tiny_llama(), WrittenOut()])
    before = _state(model)
    with pytest.raises(ValueError, match=r"1 \(WrittenOut\) calls silu in its forward.*only="):
        patch_model(model, activation="swiglu")
    assert _state(model) == before
    assert len(patch_model(model, activation="swiglu", only="0.*").fused) == 2


@pytest.mark.parametrize("activation", ["gelu", "SwiGLU", "", 1])
def test_an_unknown_activation(activation):
    model = tiny_llama()
    with pytest.raises(ValueError, match=f'"swiglu" or "silu"; got {activation!r}'):
        patch_model(model, activation=activation)
    assert not any(isinstance(module, FusedModule) for module in model.modules())


def test_an_error_after_the_swap_restores_model_and_config(monkeypatch):
    from hf_swiglu.patching.rewriting import fused_classes

    def failing(*args):
        raise KeyError("after the swap")

    model = tiny_llama()
    before = _state(model)
    monkeypatch.setattr(fused_classes, "fused_over", failing)
    with pytest.raises(KeyError, match="after the swap"):
        patch_model(model, activation="swiglu")
    assert _state(model) == before


def test_training_mode_frozen_config_and_copies_survive_a_swap():
    model = tiny_llama().train()
    patch_model(model, activation="swiglu")
    assert all(module.training for module in model.modules())
    twin = copy.deepcopy(model)
    assert unpatch_model(twin) == 2
    assert twin.config.hidden_act == "silu" and model.config.hidden_act == "swiglu"
    assert type(twin.model.layers[0].mlp.act_fn) is SiLUActivation
    assert type(model.model.layers[0].mlp.act_fn) is SwiGLU


def test_a_model_whose_layers_were_dropped():
    model = tiny_llama(num_hidden_layers=4)
    model.model.layers = model.model.layers[:2]
    before = _state(model)
    assert len(patch_model(model, activation="swiglu").fused) == 2
    assert model.config.hidden_act == "swiglu"
    unpatch_model(model)
    assert _state(model) == before


class WithArguments(LlamaForCausalLM):
    def __init__(self, config, scale):
        super().__init__(config)
        self.scale = scale


def test_a_class_with_constructor_arguments_goes_by_its_config():
    model = WithArguments(tiny_llama().config, 2.0)
    assert len(patch_model(model, activation="swiglu").fused) == 2
    assert model.config.hidden_act == "swiglu"
    unpatch_model(model)
    # Nothing in this config says what the gates have.
    model.config.hidden_act = "gelu"
    before = _state(model)
    with pytest.raises(ValueError, match=r"WithArguments cannot be built from its config alone.*only="):
        patch_model(model, activation="swiglu")
    assert _state(model) == before


def test_an_adapter_of_a_swapped_model_is_warned_of(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    patch_model(model)
    assert not caplog.records
    patch_model(model, activation="swiglu")
    (record,) = caplog.records
    assert "swiglu" in record.getMessage() and str(tmp_path) in record.getMessage() and "PEFT" in record.getMessage()


def test_a_swap_that_fails_goes_back_one_step_and_undo_to_the_beginning(monkeypatch):
    from hf_swiglu.patching.rewriting import fused_classes

    model = tiny_llama(hidden_act="gelu")
    before = _state(model)
    patch_model(model, activation="silu")
    once = _state(model)

    def failing(*args):
        raise KeyError("half-way")

    unpatch = [module for module in model.modules() if isinstance(module, FusedModule)]
    with monkeypatch.context() as patch:
        patch.setattr(fused_classes, "is_fused_with", failing)
        with pytest.raises(KeyError, match="half-way"):
            patch_model(model, activation="swiglu")
    assert _state(model) == once and unpatch
    unpatch_model(model)
    assert _state(model) == before
