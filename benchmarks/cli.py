"""The command line of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.charts import plot as draw
from benchmarks.suite import LEVELS, run_benchmarks
from hf_swiglu.commands.console import run_app, show

NAME = "python -m benchmarks"

app = typer.Typer(help="Benchmarks of hf_swiglu.", add_completion=False, rich_markup_mode=None)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_app(app, sys.argv[1:] if arguments is None else arguments, NAME)


@app.command()
def measure(
    level: Annotated[list[str] | None, typer.Option(help="kernel, mlp or model; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device; by default a GPU if there is one.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each contender of each case.")] = 0.5,
    compile: Annotated[bool, typer.Option(help="Measure torch.compile too.")] = False,
    rows: Annotated[Path | None, typer.Option(help="Append the rows to this file, as JSON lines.")] = None,
) -> None:
    """Time and memory of the kernels, of an MLP and of SmolLM2, against eager PyTorch. Takes minutes."""
    unknown = set(level or ()) - LEVELS.keys()
    if unknown:
        raise typer.BadParameter(f"--level is {', '.join(LEVELS)}; got {', '.join(sorted(unknown))}")
    command = " ".join([NAME, *sys.argv[1:]])
    run_benchmarks(
        level or tuple(LEVELS), device=device, seconds=seconds, compiled=compile, file=rows, command=command, show=show
    )


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="What `measure --rows` wrote.")],
    folder: Annotated[Path, typer.Option(help="Where the charts go.")] = Path("."),
    page: Annotated[list[Path] | None, typer.Option(help="A Markdown page with marked tables; may repeat.")] = None,
) -> None:
    """Draw charts from measured rows, and write the tables of Markdown pages."""
    for chart in draw(files, folder=folder, pages=page or ()):
        show(chart)
