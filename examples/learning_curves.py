"""What from_scratch.py and swap_and_recover.py share: a row for each run, and curves with the spread over seeds."""

import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from operator import itemgetter
from pathlib import Path

import torch

from hf_swiglu.commands import doctor

# Okabe and Ito's palette, which colour-blind readers can tell apart; and line styles, for prints in grey.
STYLES = [("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#000000", ":")]


def write_row(file: Path, row: dict, command: str) -> None:
    """Append one run as a JSON line, with the versions and the kernel that ran."""
    environment = doctor.environment(torch.device("cpu"))
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row | {"environment": environment, "command": command, "time": time}) + "\n")


def read_rows(file: Path) -> list[dict]:
    """The rows of a file, the last of each run: same name, seed, learning rate and number of steps."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({(row["name"], row["seed"], row["lr"], row["step"][-1]): row for row in rows}.values())


def by_name(rows: list[dict], name: Callable = itemgetter("name")) -> dict[object, list[dict]]:
    """The runs of each name, by seed."""
    runs: dict[object, list[dict]] = {}
    for row in sorted(rows, key=itemgetter("seed")):
        runs.setdefault(name(row), []).append(row)
    return runs


def over_seeds(runs: list[dict], key: str) -> torch.Tensor:
    """[seeds, evaluations]"""
    return torch.tensor([run[key] for run in runs], dtype=torch.float64)


def spread(values: torch.Tensor, digits: int) -> str:
    """A cell of a table: the mean, and of several seeds the least and the greatest."""
    low, mean, high = (
        f"{value:,.{digits if value < 1000 else 0}f}" for value in (values.min(), values.mean(), values.max())
    )
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *lines])


def write_table(page: Path, name: str, table: str) -> None:
    """Replace what the Markdown page has between `<!-- name -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\2", text, flags=re.DOTALL))


def draw_curves(axes, curves: dict[str, tuple[list[int], torch.Tensor]]) -> None:
    """The mean over seeds as a line, and from the least to the greatest as a band."""
    for (name, (steps, values)), (colour, style) in zip(curves.items(), STYLES):
        axes.plot(steps, values.mean(0), style, color=colour, linewidth=2.5, label=name)
        axes.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("optimiser steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def two_panels():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 17, "axes.titlesize": 17})
    return pyplot.subplots(1, 2, figsize=(15, 6), constrained_layout=True)


def save(figure, file: Path) -> None:
    """With the first panel's legend below both."""
    from matplotlib import pyplot

    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, handlelength=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
