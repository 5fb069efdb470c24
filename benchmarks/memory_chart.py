"""The picture of docs/long-sequences.md: what one MLP keeps, and memory and time of a step against sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Buffers of tokens x intermediate size between forward and backward: docs/finetuning.md has the measurements. Liger's
# fused product keeps its two inputs, and the down projection keeps its output
# (https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/swiglu.py).
BUFFERS = {"eager": 4, "Liger": 3, "keep=2": 2, "keep=1": 1, "keep=0, tile": 0}

# Okabe and Ito's palette, which colour-blind readers can tell apart; and line styles, for prints in grey.
STYLES = {
    "eager": ("#000000", "-"),
    "checkpointed": ("#7F7F7F", "--"),
    "keep=2": ("#0072B2", "-"),
    "keep=0": ("#56B4E9", "-."),
    "tile=512": ("#D55E00", "-"),
    "tile=512, checkpointed": ("#E69F00", "--"),
}


def draw(rows: Sequence[dict], file: Path) -> None:
    """Draw the rows of level "long" of one machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 15, "axes.titlesize": 16})
    figure, (bars, memory, time) = plt.subplots(1, 3, figsize=(18, 6), constrained_layout=True)
    _draw_buffers(bars)
    _draw_lines(memory, rows, lambda contender, eager: contender["peak_bytes"] / 1e6)
    memory.set(title="peak memory of a training step, MB", yscale="log")
    _draw_lines(time, rows, lambda contender, eager: contender["us"] / eager["us"])
    time.set(title="time of the step, in parts of eager's", ylim=(0, None))
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    row = rows[-1]
    figure.suptitle(
        f"LLaMA with 4 layers, float32, {row['device']}, torch {row['torch']}, commit {row['commit']}", fontsize=11
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def _draw_buffers(axes) -> None:
    places = range(len(BUFFERS))
    colours = ["#000000", "#7F7F7F", "#0072B2", "#0072B2", "#0072B2"]
    axes.bar(places, list(BUFFERS.values()), color=colours, width=0.6)
    for place, count in zip(places, BUFFERS.values()):
        axes.annotate(str(count), (place, count), ha="center", va="bottom", fontsize=18)
    axes.set_xticks(places, list(BUFFERS), rotation=20)
    axes.set(title="tensors that one MLP keeps for backward", ylim=(0, 4.6), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_lines(axes, rows: Sequence[dict], value) -> None:
    lengths = [int(row["size"].split(" x ")[1]) for row in rows]
    for name, (colour, style) in STYLES.items():
        values = [value(row["contenders"][name], row["contenders"]["eager"]) for row in rows]
        axes.plot(lengths, values, style, color=colour, label=name, linewidth=2.5, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
