"""Train a small byte-level LLaMA from scratch on Shakespeare, with each `hidden_act`, and compare the losses.

    python examples/from_scratch.py                    # swiglu, silu, gelu and relu; some minutes on a CPU
    python examples/from_scratch.py --seeds 0 1 2      # the same with three seeds: curves with their spread

With one seed, all activations have the same initial weights and the same batches; parameters, steps and learning rate
are the same for all. `hidden_act="swiglu"` is the self-gated function, so that this MLP computes
gate^2 * sigmoid(gate) * up; the SwiGLU of the papers is "silu". docs/training.md has the results.
"""

import argparse
import sys
from pathlib import Path

import torch
from finetune import read_text
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
from transformers import LlamaConfig, LlamaForCausalLM

from hf_swiglu import patch_model

ACTIVATIONS = ["swiglu", "silu", "gelu", "relu"]
BLOCK, BATCH = 128, 16


def build(activation: str, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_act=activation,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    # GELU and ReLU have nothing to fuse.
    patch_model(model, strict=False)
    return model


def batch(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - BLOCK, (BATCH,), generator=generator)
    return torch.stack([data[start : start + BLOCK] for start in starts]).long()


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def held_out_loss(model, data: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([loss_of(model.eval(), batch(data, generator)) for _ in range(10)]).mean().item()


def train(activation: str, data: torch.Tensor, steps: int, seed: int, lr: float) -> dict:
    """The row of one run: at ten times and at the start, the loss on the last tenth of the text, and the mean norm that
    the gradient has had since the time before, before clipping."""
    model = build(activation, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    row = {"name": activation, "seed": seed, "lr": lr, "step": [0], "loss": [held_out_loss(model, held_out)]}
    row["gradient_norm"], norms = [], []
    for step in tqdm(range(1, steps + 1), desc=f"{activation}, seed {seed}", unit="step"):
        loss_of(model.train(), batch(training, generator)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == steps:
            row["step"].append(step)
            row["loss"].append(held_out_loss(model, held_out))
            row["gradient_norm"].append(torch.stack(norms).mean().item())
            norms.clear()
    return row


def draw(rows: list[dict], file: Path) -> None:
    """The losses, and beside them their difference from silu's with the same seed."""
    silu = {row["seed"]: row["loss"] for row in rows if row["name"] == "silu"}
    figure, (left, right) = two_panels()
    runs = by_name(rows).items()
    draw_curves(left, {name: (of_name[0]["step"], over_seeds(of_name, "loss")) for name, of_name in runs})
    left.set(title="loss on held-out text, nats per byte")
    if silu.keys() >= {row["seed"] for row in rows}:
        above = {}
        for name, of_name in runs:
            baseline = torch.tensor([silu[run["seed"]] for run in of_name], dtype=torch.float64)
            above[name] = of_name[0]["step"], over_seeds(of_name, "loss") - baseline
        draw_curves(right, above)
        right.set(title="above silu's with the same seed")
    save(figure, file)


def table(rows: list[dict]) -> str:
    """Markdown: means over the seeds, and from the least to the greatest."""
    runs = by_name(sorted(rows, key=lambda row: row["lr"]), lambda row: (row["name"], row["lr"]))
    early, last = (rows[0]["step"][place] for place in (1, -1))
    heads = ["`hidden_act`", "learning rate", "seeds", f"loss at step {early}", f"loss at step {last}", "gradient norm"]
    lines = []
    for (name, lr), of_name in runs.items():
        losses, norms = over_seeds(of_name, "loss"), over_seeds(of_name, "gradient_norm").mean(0)
        cells = [name, f"{lr:g}", str(len(of_name)), spread(losses[:, 1], 3), spread(losses[:, -1], 3)]
        lines.append([*cells, f"up to {norms.max():.1f}, {norms[-1]:.2f} at the end"])
    return markdown(heads, lines)


def main(arguments=None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--activations", nargs="+", default=ACTIVATIONS)
    parser.add_argument("--text", nargs="+", type=Path, help="default: Shakespeare")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--rows", type=Path, default=Path("from_scratch.jsonl"), help="runs are appended to this file")
    parser.add_argument("--out", type=Path, default=Path("from_scratch.png"), help="chart of the runs in --rows")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced")
    options = parser.parse_args(arguments)
    data = torch.frombuffer(bytearray("\n".join(read_text(options.text)).encode()), dtype=torch.uint8)
    command = " ".join(["python examples/from_scratch.py", *arguments])
    for seed in options.seeds:
        for name in options.activations:
            write_row(options.rows, train(name, data, options.steps, seed, options.lr), command)
    rows = [row for row in read_rows(options.rows) if (row["lr"], row["step"][-1]) == (options.lr, options.steps)]
    draw(rows, options.out)
    print(f"nats per byte on text that was not trained on, mean over the seeds (least to greatest):\n{table(rows)}")
    if options.page:
        write_table(options.page, "from_scratch", table(rows))


if __name__ == "__main__":
    main()
