"""The name "swiglu" in transformers: the module, the registration and its undoing, and real models built with it."""

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import activations
from transformers.activations import ACT2CLS, ACT2FN

import hf_swiglu
from hf_swiglu import SwiGLU, register, unregister

TABLES = (ACT2FN, ACT2CLS)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
# model class, config class, options; the option that names the activation comes first
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"hidden_act": "swiglu"} | SMALL | HEADS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"hidden_act": "swiglu"} | SMALL | HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"hidden_activation": "swiglu"} | SMALL | HEADS),
    "bert": ("BertForMaskedLM", "BertConfig", {"hidden_act": "swiglu"} | SMALL | {"vocab_size": 64}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"activation_function": "swiglu", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_act": "swiglu"} | SMALL | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"feed_forward_proj": "swiglu"} | T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {"feed_forward_proj": "gated-swiglu"} | T5),
}


class Foreign(nn.Module):
    """An activation of another library with the same name."""


class ByHand(nn.Module):
    def forward(self, x):
        return x * x * torch.sigmoid(x)


@pytest.fixture
def tables():
    """transformers' two tables, put back afterwards."""
    saved = [OrderedDict(dict.items(table)) for table in TABLES]
    yield TABLES
    for table, entries in zip(TABLES, saved, strict=True):
        table.clear()
        table.update(entries)
    hf_swiglu.activation._replaced.clear()


def entries(table):
    """What is stored, in order: ACT2FN instantiates what `table[name]` returns."""
    return list(dict.items(table))


def build(name):
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, model_class)(config).eval()


def batch(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
    tokens = torch.arange(14).reshape(2, 7) + 2
    return {"input_ids": tokens, "labels": tokens}


def test_the_module_is_x_times_swish():
    x = torch.linspace(-9, 9, 37)
    torch.testing.assert_close(SwiGLU()(x), x * (x * torch.sigmoid(x)))


def test_both_tables_hold_the_class():
    for table in TABLES:
        assert dict.get(table, "swiglu") is SwiGLU
    assert isinstance(ACT2FN["swiglu"], SwiGLU)
    assert isinstance(activations.get_activation("swiglu"), SwiGLU)
    assert ACT2FN["swiglu"] is not ACT2FN["swiglu"], "models must not share one module"


def test_registering_twice_changes_nothing(tables):
    before = [entries(table) for table in tables]
    register()
    register(overwrite=True)
    assert [entries(table) for table in tables] == before


def test_unregistering_removes_the_name(tables):
    unregister()
    assert all("swiglu" not in table for table in tables)
    with pytest.raises(KeyError, match="swiglu"):
        ACT2FN["swiglu"]
    unregister()
    register()
    assert isinstance(ACT2FN["swiglu"], SwiGLU)


@pytest.mark.parametrize("holder", [(0,), (1,), (0, 1)], ids=["ACT2FN", "ACT2CLS", "both"])
def test_a_foreign_entry_is_refused_and_left_alone(tables, holder):
    unregister()
    for index in holder:
        tables[index]["swiglu"] = Foreign
    before = [entries(table) for table in tables]
    with pytest.raises(ValueError, match=r"Foreign.*register\(overwrite=True\)"):
        register()
    assert [entries(table) for table in tables] == before


@pytest.mark.parametrize("holder", [(0,), (1,), (0, 1)], ids=["ACT2FN", "ACT2CLS", "both"])
@pytest.mark.parametrize("entry", [Foreign, (Foreign, {"inplace": True})], ids=["class", "class and options"])
def test_overwriting_is_undone_exactly(tables, holder, entry):
    unregister()
    for index in holder:
        tables[index]["swiglu"] = entry
        tables[index]["another"] = Foreign  # so that "swiglu" has a place to lose
    before = [entries(table) for table in tables]
    register(overwrite=True)
    register(overwrite=True)
    assert all(dict.get(table, "swiglu") is SwiGLU for table in tables)
    unregister()
    assert [entries(table) for table in tables] == before


def test_unregistering_leaves_what_others_put_there_since(tables):
    for table in tables:
        table["swiglu"] = Foreign
    unregister()
    assert all(dict.get(table, "swiglu") is Foreign for table in tables)


def test_an_overwritten_entry_is_not_restored_by_a_later_registration(tables):
    unregister()
    for table in tables:
        table["swiglu"] = Foreign
    register(overwrite=True)
    for table in tables:
        del table["swiglu"]
    register()
    unregister()
    assert all("swiglu" not in table for table in tables)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_with_it(name):
    model = build(name)
    inputs = batch(name)
    found = [path for path, module in model.named_modules() if type(module) is SwiGLU]
    with torch.no_grad():
        logits = model(**inputs).logits
        for path in found:
            model.set_submodule(path, nn.Identity())
        without = model(**inputs).logits
        for path in found:
            model.set_submodule(path, ByHand())
        by_hand = model(**inputs).logits
    assert len(found) >= 2, "one for each layer"
    torch.testing.assert_close(logits, by_hand)
    assert not torch.equal(logits, without)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_save_and_reload(name, tmp_path):
    model = build(name)
    inputs = batch(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    unused = {key for key, value in model.named_parameters() if value.grad is None}
    assert not unused
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    still = {key for key, value in model.named_parameters() if not value.grad.any()}
    assert moved | still == set(before)
    # A key's bias cancels in the softmax, and a batch does not see every row of every table; all else must learn.
    assert not {key for key in still if "bias" not in key}

    model.save_pretrained(tmp_path)
    option, value = next(iter(MODELS[name][2].items()))
    reloaded = type(model).from_pretrained(tmp_path)
    assert getattr(reloaded.config, option) == value
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


def test_from_pretrained_takes_the_name_as_an_override(tmp_path):
    torch.manual_seed(0)
    options = {**MODELS["llama"][2], "hidden_act": "silu"}
    silu = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    silu.save_pretrained(tmp_path)
    swapped = transformers.LlamaForCausalLM.from_pretrained(tmp_path, hidden_act="swiglu")
    for layer in silu.model.layers:
        layer.mlp.act_fn = ByHand()
    with torch.no_grad():
        torch.testing.assert_close(swapped(**batch("llama")).logits, silu(**batch("llama")).logits)


RELOAD = """
import sys
import hf_swiglu, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs, logits = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, logits)
"""


@pytest.mark.slow
def test_another_process_reloads_the_same_model(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.save((batch("llama"), model(**batch("llama")).logits), tmp_path / "expected.pt")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "model"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=Path(hf_swiglu.__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
