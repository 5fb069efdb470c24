"""Long runs in which nothing may grow: `make test-soak`.

100,000 calls of the operators, 2,000 training steps and 500 cycles of patching and unpatching. After the first tenth
and at the end, the process's memory, the objects that Python's collector knows, and the classes among them are counted.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_swiglu import patch_model, patch_on_load, swiglu, swiglu_packed, unpatch_model

CALLS, STEPS, CYCLES = 100_000, 2_000, 500
# The allocator's own, for pieces that it has not returned: a tensor of 64 KiB that stays in every step or cycle, or 50
# bytes in every call, are more.
ALLOWED_BYTES = 4 * 2**20
# Caches of Python and PyTorch that fill late. One object that stays in every step or cycle is more.
ALLOWED_OBJECTS = 100
SIZES = {
    "hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0,
}  # fmt: skip
MEMORY: tuple[dict, ...] = ({}, {"keep": 3}, {"keep": 1}, {"keep": 0}, {"tile": 16})


class Counts(NamedTuple):
    """What a process holds."""

    bytes: int
    objects: int
    classes: int


def main() -> int:
    torch.manual_seed(0)
    growths = {
        f"{CALLS:,} calls": grown(CALLS, calls()),
        f"{STEPS:,} training steps": grown(STEPS, training_steps()),
        f"{CYCLES:,} cycles of patching": grown(CYCLES, cycles()),
    }
    faults = {name: fault for name, growth in growths.items() if (fault := why_too_much(growth))}
    for name, fault in faults.items():
        print(f"{name}: {fault}")
    return int(bool(faults))


def grown(count: int, action: Callable[[int], object]) -> Counts:
    """By how much the process holds more after `count` actions than after a tenth of them."""
    for at in range(count // 10):
        action(at)
    first = held()
    for at in range(count // 10, count):
        action(at)
    last = held()
    growth = Counts(*(after - before for after, before in zip(last, first)))
    print(f"{count:,}: {first} -> {last}", flush=True)
    return growth


def held() -> Counts:
    gc.collect()
    objects = gc.get_objects()
    classes = sum(issubclass(type(each), type) for each in objects)
    return Counts(psutil.Process().memory_info().rss, len(objects), classes)


def why_too_much(growth: Counts) -> str | None:
    if growth.classes > 0:
        return f"{growth.classes} classes stayed"
    if growth.objects > ALLOWED_OBJECTS:
        return f"{growth.objects} objects stayed; {ALLOWED_OBJECTS} are allowed"
    if growth.bytes > ALLOWED_BYTES:
        return f"memory grew by {growth.bytes:,} bytes; {ALLOWED_BYTES:,} are allowed"
    return None


def calls() -> Callable[[int], object]:
    """A call of an operator, another one each time: forms, dtypes, layouts, sizes, with and without gradients."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    inputs = [torch.randn(rows, 512).to(dtype) for dtype in dtypes for rows in (2, 52)]

    def backward(call: Callable[..., Tensor], *tensors: Tensor) -> None:
        call(*(tensor.detach().requires_grad_() for tensor in tensors)).sum().backward()

    makes: list[Callable[[Tensor], object]] = [
        swiglu,
        swiglu_packed,
        lambda x: swiglu(x, x),
        lambda x: swiglu(*x.chunk(2, -1)),
        lambda x: swiglu(x[:, ::2], x[:, 1::2]),
        lambda x: backward(swiglu, x),
        lambda x: backward(swiglu, x, x * 2),
        lambda x: backward(swiglu_packed, x),
    ]
    every = list(itertools.product(makes, inputs))

    def call(at: int) -> None:
        make, x = every[at % len(every)]
        make(x)

    return call


def training_steps() -> Callable[[int], object]:
    """A step of a tiny model, with another memory setting each time."""
    models = [LlamaForCausalLM(LlamaConfig(**SIZES)).train() for _ in MEMORY]
    for model, options in zip(models, MEMORY):
        patch_model(model, **options)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    tokens = torch.randint(3, 127, (2, 40))

    def step(at: int) -> None:
        model, optimizer = models[at % len(models)], optimizers[at % len(models)]
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def cycles() -> Callable[[int], object]:
    """Patching and unpatching, another family and other options each time; every tenth time while a model loads."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    phi = Phi3ForCausalLM(Phi3Config(**SIZES))
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16))
    every: list[tuple] = [*itertools.product((llama, phi), MEMORY), (llama, {"activation": "swiglu"})]
    every += [(gemma, {"keep": 0}), (llama, {"verify": True})]
    tokens = torch.randint(3, 127, (2, 40))

    def cycle(at: int) -> None:
        if at % 10 == 9:
            with patch_on_load():
                model, options = LlamaForCausalLM(LlamaConfig(**SIZES)), {}
        else:
            model, options = every[at % len(every)]
            patch_model(model, **options)
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad()
        assert unpatch_model(model) == 1

    return cycle


if __name__ == "__main__":
    sys.exit(main())
