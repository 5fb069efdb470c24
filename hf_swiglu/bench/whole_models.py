"""SmolLM2-135M, eager and fused, with the same weights: prefill, decode and a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_swiglu import models, patch_model
from hf_swiglu.bench.kernels import DTYPES, WrongResult
from hf_swiglu.bench.mlps import shared_copy
from hf_swiglu.bench.rows import Case, Row
from hf_swiglu.bench.timing import compiled, take_turns
from hf_swiglu.demo import generate, sample_tokens
from hf_swiglu.measuring import peak_bytes, seconds_of

PROMPT, DECODED, BATCH, LENGTH = 32, 8, 2, 256
SMALL = 1, 64


def measure(device: torch.device, seconds: float, compile: bool) -> Iterator[Row]:
    """Three phases in float32 and bfloat16. Weights, gradients and AdamW's states are not part of the memory."""
    model, tokenizer = models.load(models.resolve(models.PACKAGED), device)
    tokens = sample_tokens(tokenizer, device)
    for dtype in ("float32", "bfloat16"):
        eager = model.to(DTYPES[dtype])  # type: ignore[arg-type]
        ours = shared_copy(eager)
        patch_model(ours)
        contenders = {"eager": eager, "ours": ours}
        if dtype == "float32":
            _check(contenders, tokens[:, :LENGTH])
        if compile:
            contenders["compile"] = compiled(shared_copy(eager))  # type: ignore[assignment]
        for what, phase in _phases(eager, tokens).items():
            functions = {label: phase(contender, tokens) for label, contender in contenders.items()}
            if what.startswith("decode"):
                # It would be compiled anew for each length of the cache.
                functions.pop("compile", None)
            for function in functions.values():
                # Gradients and the optimizer's states come into being in the first call, and stay.
                function()
            peaks = {label: peak_bytes(functions[label], device) for label in ("eager", "ours")}
            times = take_turns(functions, seconds, device)
            yield Row(Case("model", what, dtype, "SmolLM2-135M"), times, peak_bytes=peaks)


def _prefill(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(input_ids=tokens[:, : BATCH * LENGTH], use_cache=False, logits_to_keep=1))


def _decode(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    return lambda: generate(model, tokens[:, :PROMPT], DECODED)


def _training(model: PreTrainedModel, tokens: Tensor, batch: int, length: int) -> Callable[[], object]:
    ids = tokens[:, : batch * length].reshape(batch, length)
    # A learning rate of zero does all the work and leaves every round the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def _phases(
    model: PreTrainedModel, tokens: Tensor
) -> dict[str, Callable[[PreTrainedModel, Tensor], Callable[[], object]]]:
    batch, length = BATCH, LENGTH
    # Processors without bfloat16 products take 15 s for the small step, and 100 s for the usual one.
    if model.device.type == "cpu" and seconds_of(_training(model, tokens, *SMALL), model.device) > 4:
        batch, length = SMALL
    return {
        f"prefill, 1 x {BATCH * LENGTH} tokens": _prefill,
        f"decode, {DECODED} tokens after {PROMPT}": _decode,
        f"training, {batch} x {length} tokens": functools.partial(_training, batch=batch, length=length),
    }


def _check(contenders: dict[str, PreTrainedModel], tokens: Tensor) -> None:
    with torch.no_grad():
        eager, ours = (model(input_ids=tokens, use_cache=False).logits for model in contenders.values())
    difference = ((ours - eager).norm() / eager.norm()).item()
    # float32 rounding makes 1e-6 of it; the wrong activation, 1e-1 and more.
    if not difference <= 1e-5:
        raise WrongResult(f"ours: logits differ from eager's by {difference:.1e}")
