"""Level "long": peak memory and time of a training step against sequence length, with each memory setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.result_rows import Case, Row
from hf_swiglu import patch_model
from hf_swiglu.commands.models import enable_checkpointing
from hf_swiglu.commands.peak_memory import peak_bytes
from hf_swiglu.commands.timing import take_turns

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# Whether layers are checkpointed, and the options of patch_model; None for the unpatched model.
SETTINGS: dict[str, tuple[bool, dict[str, int] | None]] = {
    "eager": (False, None),
    "checkpointed": (True, None),
    "keep=2": (False, {"keep": 2}),
    "keep=0": (False, {"keep": 0}),
    "tile=512": (False, {"keep": 0, "tile": 512}),
    "tile=512, checkpointed": (True, {"keep": 0, "tile": 512}),
}
# The intermediate size is 3.5 hidden sizes, as in Llama 3.
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": LENGTHS[-1],
}
# A step of the longest sequence takes 20 s on two cores because of attention: steps longer than this have one round.
_SLOW_SECONDS = 2


def measure(device: torch.device, seconds: float, compile: bool) -> Iterator[Row]:
    """One step, forward and backward of one sequence in float32. Weights and gradients are not part of the memory."""
    for length in LENGTHS:
        steps = {label: _step(device, length, *setting) for label, setting in SETTINGS.items()}
        start = time.perf_counter()
        peaks = {label: peak_bytes(step, device) for label, step in steps.items()}
        is_slow = time.perf_counter() - start > _SLOW_SECONDS * len(steps)
        times = take_turns(steps, 0 if is_slow else seconds, device, fewest_rounds=1 if is_slow else 5, calls=1)
        yield Row(Case("long", "training step", "float32", f"1 x {length}"), times, peak_bytes=peaks)


def _step(
    device: torch.device, length: int, checkpointed: bool, options: dict[str, int] | None
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device).train()  # type: ignore[arg-type]
    if checkpointed:
        enable_checkpointing(model)
    if options is not None:
        patch_model(model, **options)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(CONFIG["vocab_size"], (1, length), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step
