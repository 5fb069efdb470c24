"""PEFT's adapters on fused models: trained, merged, switched, saved, and put on before the patch or after it.

`test_patching_wrapped.py` has LoRA's dropout, whose masks tiles draw otherwise.
"""

import copy

import pytest
import torch
from support.models import fused, tiny_llama, tokens
from support.outcome import outcome
from test_tools import experts_model

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.testing import counted_launches

peft = pytest.importorskip("peft", reason="PEFT is not installed")

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=PROJECTIONS),
    "dora": peft.LoraConfig(target_modules=PROJECTIONS, use_dora=True),
    "rslora_with_bias": peft.LoraConfig(target_modules="all-linear", use_rslora=True, lora_bias=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    # The whole MLP is copied, into one that is trained and one that is not.
    "modules_to_save": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "experts": peft.LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS),
}
# LoRA with biases is not merged into projections without one.
MERGED = ["lora", "dora", "ia3", "experts"]
# A tile of 48 rows is wide enough for a kernel.
SETTINGS = pytest.mark.parametrize("setting", [{}, {"keep": 1}, {"keep": 0}, {"tile": 48}], ids=str)
ORDERS = pytest.mark.parametrize("patch_first", [True, False], ids=["patch_then_adapt", "adapt_then_patch"])


def base(name):
    return experts_model() if name == "experts" else tiny_llama()


def adapted(name, patch_first=False, setting=None):
    """A model with an adapter that is not the identity; unpatched without a setting."""
    model = base(name)
    if setting is not None and patch_first:
        patch_model(model, **setting)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, copy.deepcopy(ADAPTERS[name]))
    if setting is not None and not patch_first:
        patch_model(model, **setting)
    randomise(model)
    return model


def randomise(model):
    """Adapters start as the identity, which would hide a bypassed one."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


def trained(model):
    ids = tokens() % 64
    return outcome(model.train(), input_ids=ids, labels=ids)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens() % 64).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@SETTINGS
@ORDERS
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_as_unpatched(name, patch_first, setting):
    expected = trained(adapted(name))
    model = adapted(name, patch_first, setting)
    with counted_launches() as launches:
        actual = trained(model)
    assert "swiglu_bwd" in launches.names
    assert any(name.startswith("gradient") for name in expected)
    assert_close(actual, expected)


@ORDERS
@pytest.mark.parametrize("name", MERGED)
def test_merging_and_unloading(name, patch_first):
    plain, model = adapted(name), adapted(name, patch_first, {})
    before = logits(model)
    assert not torch.allclose(before, logits(base(name)), atol=1e-3), "the adapter does something"
    for each in (plain, model):
        each.merge_adapter()
    assert_close(logits(model), logits(plain))
    for each in (plain, model):
        each.unmerge_adapter()
    assert_close(logits(model), before)
    merged = [copy.deepcopy(each).merge_and_unload() for each in (plain, model)]
    assert_close(logits(merged[1]), logits(merged[0]))
    assert fused(merged[1]) and unpatch_model(merged[1]) and not fused(merged[1])
    assert_close(logits(merged[1]), logits(merged[0]))
    unloaded = model.unload()
    assert fused(unloaded)
    assert_close(logits(unloaded), logits(base(name)))


@ORDERS
def test_several_adapters_are_switched_and_one_is_disabled(patch_first):
    plain, model = adapted("lora"), adapted("lora", patch_first, {})
    for each in (plain, model):
        torch.manual_seed(5)
        each.add_adapter("other", peft.LoraConfig(target_modules=["gate_proj"], r=2, init_lora_weights=False))
    seen = []
    for each in (plain, model):
        first = logits(each)
        with each.disable_adapter():
            without = logits(each)
        mixed = each.eval()(input_ids=tokens(), adapter_names=["default", "other"]).logits.detach()
        each.set_adapter("other")
        second = logits(each)
        each.delete_adapter("other")
        each.set_adapter("default")
        seen.append([first, without, mixed, second, logits(each)])
    assert_close(seen[1], seen[0])
    assert_close(seen[1][1], logits(tiny_llama()))
    assert not torch.allclose(seen[1][0], seen[1][3], atol=1e-3)
    assert fused(model) == 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_is_the_same_file_and_loads_into_a_fused_base(name, tmp_path):
    plain, model = adapted(name), adapted(name, True, {})
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fused")
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("plain", "fused")]
    assert weights[0] == weights[1]
    target = base(name)
    patch_model(target)
    loaded = peft.PeftModel.from_pretrained(target, tmp_path / "fused")
    assert fused(loaded)
    assert_close(logits(loaded), logits(plain))
