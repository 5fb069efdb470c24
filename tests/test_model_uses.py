"""Whole fused models in use: generation, pipelines, dtypes, checkpointing, and the copies that trainers make."""

import copy
import functools

import pytest
import torch
from support.models import fused, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from test_finetune import write_tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_swiglu import patch_model
from hf_swiglu.testing import counted_launches

every_model = pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
every_setting = pytest.mark.parametrize("setting", [{}, {"keep": 1}, {"keep": 0}, {"tile": 48}], ids=str)


def pair(build, **setting):
    """The original and the fused model."""
    models = build(), build()
    patch_model(models[1], **setting)
    return models


def assistant():
    """Another model that agrees with the first often enough to be of use."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight += torch.randn(model.lm_head.weight.shape) * 1e-3
    patch_model(model)
    return model


WAYS = {
    "static_cache": lambda: {"cache_implementation": "static"},
    "assisted": lambda: {"assistant_model": assistant()},
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "beams": lambda: {"num_beams": 3},
    "sampled": lambda: {"do_sample": True, "temperature": 2.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", [{}, {"tile": 48}], ids=str)
def test_generation_gives_the_same_tokens(way, setting):
    plain, model = pair(tiny_llama, **setting)
    prompt = tokens()[:1].repeat(1, 2)
    generated = []
    for each in (plain, model):
        torch.manual_seed(0)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        with counted_launches() as launches:
            generated.append(each.generate(prompt, **options | WAYS[way]()))
    assert "swiglu_fwd" in launches.names
    assert torch.equal(generated[1].sequences, generated[0].sequences)
    assert generated[0].sequences.shape[1] > prompt.shape[1]
    torch.testing.assert_close(generated[1].scores, generated[0].scores, rtol=1e-4, atol=1e-5)


def test_pipeline(tmp_path):
    folder = write_tiny_model(tmp_path)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
    for patch in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if patch:
            patch_model(model)
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        with counted_launches() as launches:
            texts.append(generate("wherefore art thou", max_new_tokens=8, do_sample=False))
    assert launches.names and texts[1] == texts[0]


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", [{}, {"keep": 0}], ids=str)
def test_another_dtype_after_patching_has_the_same_bits(build, dtype, setting):
    plain, model = pair(build, **setting)
    convert = {torch.float16: lambda each: each.half(), torch.bfloat16: lambda each: each.to(torch.bfloat16)}[dtype]
    results = []
    for each in (plain, model):
        with counted_launches() as launches:
            results.append(outcome(convert(each), input_ids=tokens(), labels=tokens()))
    assert "swiglu_bwd" in launches.names
    torch.testing.assert_close(results[1]["logits"], results[0]["logits"], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[0])


def keeps_products_of_matrices(context, operator, *args, **keywords):
    is_product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


@every_model
@every_setting
def test_selective_checkpointing_of_every_layer(build, setting):
    contexts = functools.partial(create_selective_checkpoint_contexts, keeps_products_of_matrices)
    results = []
    for model in pair(build, **setting):
        model.train().gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        results.append(outcome(model, input_ids=tokens(), labels=tokens()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def trained_with(model, make_twin, update):
    """The losses of a model and the logits of its twin, which `update` is called on after each step."""
    twin, losses = make_twin(model), []
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = model.train()(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        update(twin, model)
        with torch.no_grad():
            losses += [loss.detach(), twin(input_ids=tokens(step)).logits]
    return losses, twin


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def frozen(model):
    return copy.deepcopy(model).requires_grad_(False).eval()


def reference(model, **options):
    utilities = pytest.importorskip("trl.experimental.utils", reason="TRL is not installed")
    if not hasattr(utilities, "create_reference_model"):
        # TRL 0.27 has it in the package itself.
        utilities = pytest.importorskip("trl")
    return utilities.create_reference_model(model, **options)


def shared_reference(model):
    """The first layer is the very same module in both, and frozen in both."""
    return reference(model, num_shared_layers=1)


TWINS = {
    averaged: lambda twin, model: twin.update_parameters(model),
    frozen: lambda twin, model: None,
    reference: lambda twin, model: None,
    shared_reference: lambda twin, model: None,
}


@every_setting
@pytest.mark.parametrize("make_twin", TWINS, ids=lambda make: make.__name__)
def test_copies_beside_a_trained_model(make_twin, setting):
    plain, model = pair(tiny_llama, **setting)
    expected, _ = trained_with(plain, make_twin, TWINS[make_twin])
    losses, twin = trained_with(model, make_twin, TWINS[make_twin])
    assert fused(twin) == 2
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
