"""Train a small byte-level LLaMA from scratch on Shakespeare, once for each `hidden_act`, and compare the losses.

    python examples/from_scratch.py                # swiglu, silu, gelu and relu; some minutes on a CPU

Same seed, same batches, same number of parameters and steps. One seed of one small model predicts little about a large
one. `hidden_act="swiglu"` is the self-gated function, so that this MLP computes gate^2 * sigmoid(gate) * up; the SwiGLU
of the papers is "silu".
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from finetune import read_text
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_swiglu import patch_model

matplotlib.use("Agg")
from matplotlib import pyplot

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


def train(activation: str, data: torch.Tensor, steps: int, seed: int) -> tuple[list[float], float]:
    """The loss of every step, and the loss on the last tenth of the text."""
    model = build(activation, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    losses = []
    for _ in tqdm(range(steps), desc=activation, unit="step"):
        loss = loss_of(model.train(), batch(training, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, held_out_loss(model, held_out)


def draw(curves: dict[str, list[float]], file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for activation, losses in curves.items():
        # A mean over ten steps: the loss differs more between batches than between activations.
        means = torch.tensor(losses).unfold(0, min(10, len(losses)), 1).mean(dim=1)
        axes.plot(means, label=activation)
    axes.set(xlabel="step", ylabel="training loss, nats per byte, mean of ten steps")
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--activations", nargs="+", default=ACTIVATIONS)
    parser.add_argument("--text", nargs="+", type=Path, help="default: Shakespeare")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("from_scratch.png"))
    options = parser.parse_args(arguments)
    data = torch.frombuffer(bytearray("\n".join(read_text(options.text)).encode()), dtype=torch.uint8)
    results = {name: train(name, data, options.steps, options.seed) for name in options.activations}
    draw({name: losses for name, (losses, _) in results.items()}, options.out)
    print(f"loss in nats per byte after {options.steps} steps, on text that was not trained on")
    for name, (_, loss) in results.items():
        print(f"  {name:8} {loss:.4f}")


if __name__ == "__main__":
    main()
