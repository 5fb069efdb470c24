"""Training patched equals training unpatched: a plain loop, transformers' Trainer, TRL's SFTTrainer."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from support.models import VOCABULARY, tiny_llama, tiny_phi3
from test_finetune import finetune, write_text, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_swiglu import backends, patch_model
from hf_swiglu.testing import counted_launches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}"),
]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str):
    # The examples import finetune.py from their own folder.
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def losses_of_fifty_steps(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        # Something to learn: every sequence counts upwards.
        ids = (torch.randint(VOCABULARY, (2, 1), generator=generator) + torch.arange(40)) % VOCABULARY
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_fifty_steps_of_float32(build, checkpointing):
    expected = losses_of_fifty_steps(build(), checkpointing)
    assert expected[-1] < expected[0] / 2
    patched = build()
    patch_model(patched)
    with counted_launches() as launches:
        losses = losses_of_fifty_steps(patched, checkpointing)
    assert launches.names.count("swiglu_bwd") == 2 * 50
    assert launches.names.count("swiglu_fwd") == (3 if checkpointing else 2) * 2 * 50
    assert losses == pytest.approx(expected, rel=1e-4)


def logged(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_transformers_trainer(lora, tiny, tmp_path):
    trainer, curves = example("trainer"), []
    for patch in (False, True):
        model, tokenizer = load(tiny)
        torch.manual_seed(0)
        if lora:
            model = finetune.add_lora(model, lora)
        if patch:
            patch_model(model)
        blocks = finetune.pack([write_text(tmp_path / "text.txt").read_text()], tokenizer, 64)
        with counted_launches() as launches:
            curves.append(logged(trainer.train(model, blocks, tmp_path, 5)))
    assert launches.names.count("swiglu_bwd") == 2 * 5
    assert len(curves[1]) == 5 and curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_trl_sft_trainer(lora, tiny, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    sft, curves = example("sft"), []
    for patch in (False, True):
        model, tokenizer = load(tiny)
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
        )
        if patch:
            patch_model(model)
        torch.manual_seed(0)
        with counted_launches() as launches:
            curves.append(logged(sft.train(model, tokenizer, tmp_path, 5, lora)))
    assert launches.names.count("swiglu_bwd") == 2 * 5
    assert len(curves[1]) == 5 and curves[1] == pytest.approx(curves[0], rel=1e-4)
