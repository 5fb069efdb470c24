"""Swap the gates of SmolLM2 to "swiglu", fine-tune it on Shakespeare, and compare it with the unswapped model.

    python examples/swap_and_recover.py                    # ten minutes or so on a CPU
    python examples/swap_and_recover.py --seeds 0 1 2      # the same with three seeds: curves with their spread

All weights are trained: float32 weights, bfloat16 autocast, AdamW, the gradient clipped to a norm of 1. With one seed
both models read the same batches. docs/training.md has the results.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from finetune import SMOLLM2, learning_rate, load_model, pack, read_text, split
from learning_curves import (
    by_name,
    draw_curves,
    markdown,
    over_seeds,
    read_rows,
    save,
    spread,
    two_panels,
    write_row,
    write_table,
)
from tqdm import tqdm

from hf_swiglu import patch_model

MODELS = {"swapped": "swiglu", "unswapped": None}


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16):
        return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def evaluate(model, held_out: torch.Tensor) -> dict[str, float]:
    """The perplexity, and the largest magnitude of any MLP's product, which float16 holds up to 65,504."""
    largest = []

    def look(down, inputs):
        largest.append(inputs[0].abs().max().item())

    hooks = [part.register_forward_pre_hook(look) for name, part in model.named_modules() if name.endswith("down_proj")]
    losses = [loss_of(model, rows).item() * len(rows) for rows in held_out.split(4)]
    for hook in hooks:
        hook.remove()
    return {"perplexity": math.exp(sum(losses) / len(held_out)), "largest_product": max(largest)}


def perplexity_of_frequencies(blocks: torch.Tensor, held_out: torch.Tensor, vocabulary: int) -> float:
    """What a model reaches that knows how frequent each token is, and nothing else; every token counts once more."""
    counts = torch.bincount(blocks.flatten(), minlength=vocabulary) + 1.0
    return (counts / counts.sum())[held_out[:, 1:]].log().mean().neg().exp().item()


def train(name: str, seed: int, options) -> dict:
    """The row of one run: evaluations before the swap, right after and along the fine-tune, and between them the mean
    norm of the gradient before clipping."""
    model, tokenizer = load_model(options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks, held_out = split(pack(read_text(options.text), tokenizer, options.block), options, processes=1)
    blocks, held_out = blocks.to(model.device), held_out.to(model.device)
    row = {"name": name, "seed": seed, "lr": options.lr, "original": evaluate(model, held_out)}
    row["token_frequencies"] = perplexity_of_frequencies(blocks, held_out, model.config.vocab_size)
    patch_model(model, activation=MODELS[name])
    evaluations, norms, row["gradient_norm"], row["step"] = [evaluate(model, held_out)], [], [], [0]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    for step in tqdm(range(options.steps), desc=f"{name}, seed {seed}", unit="step"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, options)
        loss_of(model, blocks[order.roll(-step * options.batch)[: options.batch]]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            evaluations.append(evaluate(model, held_out))
            row["step"].append(step + 1)
            row["gradient_norm"].append(torch.stack(norms).mean().item())
            norms.clear()
    return row | {key: [evaluation[key] for evaluation in evaluations] for key in evaluations[0]}


def label(row: dict) -> str:
    return f"{row['name']}, lr {row['lr']:g}"


def draw(rows: list[dict], file: Path) -> None:
    figure, (left, right) = two_panels()
    runs = by_name(rows, label).items()
    draw_curves(left, {name: (of_name[0]["step"], over_seeds(of_name, "perplexity")) for name, of_name in runs})
    left.axhline(rows[-1]["token_frequencies"], color="#7F7F7F", linewidth=1.5, label="token frequencies alone")
    left.set(title="perplexity on held-out text", yscale="log")
    # Each norm is a mean since the evaluation before.
    draw_curves(right, {name: (of_name[0]["step"][1:], over_seeds(of_name, "gradient_norm")) for name, of_name in runs})
    right.set(title="norm of the gradient before clipping", yscale="log")
    save(figure, file)


def table(rows: list[dict]) -> str:
    """Perplexities as Markdown: means over the seeds, and from the least to the greatest."""
    steps = rows[0]["step"]
    shown = sorted({0, 1, len(steps) // 2, len(steps) - 1})
    heads = ["model", "seeds", *(f"step {steps[place]}" for place in shown), "largest product at step 0"]
    lines = []
    for name, of_name in by_name(rows, label).items():
        values, largest = over_seeds(of_name, "perplexity"), over_seeds(of_name, "largest_product")
        cells = [str(name), str(len(of_name)), *(spread(values[:, place], 1) for place in shown)]
        lines.append([*cells, f"{largest[:, 0].max():,.0f}"])
    return markdown(heads, lines)


def main(arguments=None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=SMOLLM2, help="Hub id or folder; default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--text", nargs="+", type=Path, help="default: Shakespeare")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--block", type=int, default=128, help="tokens in one sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences in one step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--rows", type=Path, default=Path("swap_and_recover.jsonl"), help="runs are appended to it")
    parser.add_argument("--out", type=Path, default=Path("swap_and_recover.png"), help="chart of the runs in --rows")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced")
    options = parser.parse_args(arguments, argparse.Namespace(accumulate=1, checkpointing=False))
    command = " ".join(["python examples/swap_and_recover.py", *arguments])
    for seed in options.seeds:
        for name in options.models:
            write_row(options.rows, train(name, seed, options), command)
    rows = [row for row in read_rows(options.rows) if row["step"][-1] == options.steps]
    draw(rows, options.out)
    print(f"perplexity on text that was not trained on, mean over the seeds (least to greatest):\n{table(rows)}")
    if options.page:
        write_table(options.page, "swap_and_recover", table(rows))


if __name__ == "__main__":
    main()
