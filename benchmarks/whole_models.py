"""Level "model": SmolLM2-135M, eager and fused, with the same weights: prefill, decode and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.contenders import DTYPES, WrongResult, compiled
from benchmarks.rows import Case, Row
from hf_swiglu import patch_model
from hf_swiglu.commands import models
from hf_swiglu.commands.memory import peak_bytes
from hf_swiglu.commands.phases import (
    DECODED_TOKENS,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    TRAINING_BATCH,
    phases,
    sample_tokens,
    training_step,
)
from hf_swiglu.commands.timing import seconds_per_call, take_turns

SMALL_BATCH = 1, 64
_CHECKED_TOKENS = 256


def measure(device: torch.device, seconds: float, compile: bool) -> Iterator[Row]:
    """Three phases in float32 and bfloat16. Weights, gradients and AdamW's states are not part of the memory."""
    model, tokenizer = models.load(models.resolve(models.PACKAGED), device)
    tokens = sample_tokens(tokenizer, device)
    for dtype in ("float32", "bfloat16"):
        eager = model.to(DTYPES[dtype])  # type: ignore[arg-type]
        ours = models.copy_sharing_parameters(eager)
        patch_model(ours)
        contenders = {"eager": eager, "ours": ours}
        if dtype == "float32":
            _check(contenders, tokens[:, :_CHECKED_TOKENS])
        if compile:
            contenders["compile"] = compiled(models.copy_sharing_parameters(eager))
        batch = _batch(eager, tokens)
        for phase, functions in _functions(contenders, tokens, batch).items():
            for function in functions.values():
                # The first call creates gradients and the optimizer's states, which then stay allocated.
                function()
            peaks = {label: peak_bytes(functions[label], device) for label in ("eager", "ours")}
            times = take_turns(functions, seconds, device, calls=1)
            yield Row(Case("model", _label(phase, batch), dtype, "SmolLM2-135M"), times, peak_bytes=peaks)


def _functions(
    contenders: dict[str, PreTrainedModel], tokens: Tensor, batch: tuple[int, int]
) -> dict[str, dict[str, Callable[[], object]]]:
    """For each phase, the function of each contender."""
    functions: dict[str, dict[str, Callable[[], object]]] = {"prefill": {}, "decode": {}, "training": {}}
    for label, model in contenders.items():
        for phase, function in phases(model, tokens, batch=batch, optimizer=_adamw(model)).items():
            functions[phase][label] = function
    # It would be compiled anew for each length of the cache.
    functions["decode"].pop("compile", None)
    return functions


def _label(phase: str, batch: tuple[int, int]) -> str:
    sizes = {
        "prefill": f"1 x {PREFILL_TOKENS} tokens",
        "decode": f"{DECODED_TOKENS} tokens after {PROMPT_TOKENS}",
        "training": f"{batch[0]} x {batch[1]} tokens",
    }
    return f"{phase}, {sizes[phase]}"


def _adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    # A learning rate of zero does all the work and leaves the weights equal in every round.
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def _batch(model: PreTrainedModel, tokens: Tensor) -> tuple[int, int]:
    """The usual batch, or the small one on CPUs without bfloat16 products, which take 100 s for the usual one."""
    if model.device.type != "cpu":
        return TRAINING_BATCH
    step = training_step(model, tokens, SMALL_BATCH, _adamw(model))
    return SMALL_BATCH if seconds_per_call(step, model.device) > 4 else TRAINING_BATCH


def _check(contenders: dict[str, PreTrainedModel], tokens: Tensor) -> None:
    with torch.no_grad():
        eager, ours = (model(input_ids=tokens, use_cache=False).logits for model in contenders.values())
    difference = ((ours - eager).norm() / eager.norm()).item()
    # float32 rounding makes 1e-6 of it; the wrong activation, 1e-1 and more.
    if not difference <= 1e-5:
        raise WrongResult(f"ours: logits differ from eager's by {difference:.1e}")
