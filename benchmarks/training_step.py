"""Times a training step of SmolLM2-135M with its MLPs fused against the same model as it is, in one run.

    python benchmarks/training_step.py                      # float32 and bfloat16, on the GPU if there is one
    python benchmarks/training_step.py --json steps.jsonl

The two take turns, and turns at being first; the table shows medians. A step is forward, backward and AdamW. Memory is
the peak of the tensors that forward and backward allocate, without weights and their gradients' first allocation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from kernel_times import DTYPES, surroundings
from torch import Tensor

from hf_swiglu import models, patch_model, unpatch_model
from hf_swiglu.demo import _peak_bytes, _sample_tokens

PARTS = ("forward", "backward", "optimizer", "step")


def timed_step(model, optimizer, tokens: Tensor) -> list[float]:
    """Seconds of each of PARTS."""
    times = [now(tokens.device)]
    loss = model(input_ids=tokens, labels=tokens).loss
    times.append(now(tokens.device))
    loss.backward()
    times.append(now(tokens.device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    times.append(now(tokens.device))
    return [later - earlier for earlier, later in itertools.pairwise(times)] + [times[-1] - times[0]]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, options: argparse.Namespace) -> dict:
    """Medians in milliseconds and peaks in bytes, of eager and patched, for one dtype."""
    device = torch.device(options.device)
    model, tokenizer = models.load(models.resolve(models.PACKAGED), device)
    model = model.to(DTYPES[name]).train()
    tokens = _sample_tokens(tokenizer, device)[:, : options.batch * options.length].view(options.batch, -1)
    # A learning rate of zero does all the work and leaves every round the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    variants = {"eager": unpatch_model, "patched": patch_model}
    seconds: dict[str, list[list[float]]] = {variant: [] for variant in variants}
    peaks = {}
    for variant, set_up in variants.items():
        set_up(model)
        timed_step(model, optimizer, tokens)
        peaks[variant] = _peak_bytes(lambda: model(input_ids=tokens, labels=tokens).loss.backward(), device)
    for number in range(options.rounds):
        for variant in list(variants) if number % 2 == 0 else reversed(variants):
            variants[variant](model)
            seconds[variant].append(timed_step(model, optimizer, tokens))
    row = {"dtype": name, "tokens": list(tokens.shape), "rounds": options.rounds, "peak_bytes": peaks}
    for number, part in enumerate(PARTS):
        row[f"{part}_ms"] = {
            variant: 1000 * statistics.median(times[number] for times in seconds[variant]) for variant in variants
        }
    row["rounds_won"] = sum(ours[-1] < eager[-1] for eager, ours in zip(*seconds.values(), strict=True))
    return row


def lines(row: dict) -> list[str]:
    table = []
    for part in PARTS:
        eager, patched = row[f"{part}_ms"].values()
        table.append(f"{row['dtype']:>9} {part:>10} {eager:>9.1f} ms {patched:>9.1f} ms {eager / patched:>8.2f}x")
    eager, patched = (peak / 1e6 for peak in row["peak_bytes"].values())
    table.append(f"{row['dtype']:>9} {'memory':>10} {eager:>9.1f} MB {patched:>9.1f} MB {eager / patched:>8.2f}x")
    return [*table, f"{'':>9} patched was faster in {row['rounds_won']} of {row['rounds']} rounds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object per line")
    options = parser.parse_args()
    around = surroundings(options.device)
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    print(f"{'':>9} {'':>10} {'eager':>12} {'patched':>12} {'ratio':>9}")
    for name in ("float32", "bfloat16"):
        row = measure(name, options)
        print("\n".join(lines(row)), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({**row, **around}) + "\n")


if __name__ == "__main__":
    main()
