"""The phases of a causal language model that the demo and the benchmarks measure: prefill, decode, a training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_swiglu.commands.models import ModelError

PREFILL_TOKENS = 512
PROMPT_TOKENS, DECODED_TOKENS = 32, 8
# Sequences, tokens in each.
TRAINING_BATCH = 2, 256


def phases(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batch: tuple[int, int] = TRAINING_BATCH,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Callable[[], object]]:
    """Functions that run "prefill", "decode" and "training" once, on the first of these tokens, [1, length].

    Args:
        model: a causal language model.
        tokens: at least 512.
        batch: sequences and tokens of the training step.
        optimizer: its step is part of training, and gradients stay allocated; without one, training is forward and
            backward, and gradients are freed.
    """
    return {
        "prefill": _prefill(model, tokens[:, :PREFILL_TOKENS]),
        "decode": lambda: generate(model, tokens[:, :PROMPT_TOKENS], DECODED_TOKENS),
        "training": training_step(model, tokens, batch, optimizer),
    }


def training_step(
    model: PreTrainedModel, tokens: Tensor, batch: tuple[int, int], optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """A function that runs the training step of `phases`."""
    ids = tokens[:, : batch[0] * batch[1]].reshape(batch)

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=optimizer is None)
        model.eval()

    return step


def generate(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Exactly `count` more tokens, greedily."""
    return model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


def sample_tokens(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """Miranda and Prospero, The Tempest, Act I Scene 2, after Project Gutenberg's text, as one row of tokens.

    Raises:
        ModelError: the text has fewer tokens than the phases take.
    """
    text = resources.files("hf_swiglu.commands").joinpath("sample.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids.to(device)
    if tokens.shape[1] < PREFILL_TOKENS:
        raise ModelError(f"the tokenizer makes {tokens.shape[1]} tokens of the sample text; expected over 512")
    return tokens


def _prefill(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    # As in generation, where the model can: logits of the last token only.
    can = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if can else {}
    return torch.no_grad()(lambda: model(input_ids=tokens, use_cache=False, **last))
