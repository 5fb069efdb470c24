"""Runs the levels, and writes a row for each case."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import kernels, mlps, whole_models
from benchmarks.contenders import why_not_compiled
from benchmarks.rows import surroundings
from hf_swiglu.commands import doctor

LEVELS = {"kernel": kernels.measure, "mlp": mlps.measure, "model": whole_models.measure}


def run_benchmarks(
    levels: Sequence[str] = tuple(LEVELS),
    *,
    device: str | None = None,
    seconds: float = 0.5,
    compiled: bool = False,
    file: Path | None = None,
    command: str = "benchmarks.suite.run_benchmarks()",
    show: Callable[[object], None] = print,
) -> list[dict]:
    """Measure eager PyTorch, ours and others, on one device.

    Args:
        levels: "kernel", "mlp" and "model", or some of them.
        device: a torch device; a GPU if there is one, by default.
        seconds: how long to measure each contender of each case.
        compiled: measure torch.compile too, where it works; it takes long to start.
        file: append the rows to it, one JSON object on a line.
        command: kept in the rows.
        show: receives a line for each case.

    Returns:
        The rows.

    Raises:
        ValueError: no such level.
        WrongResult: a contender is farther from float64 than the tolerance allows.

    Example:
        >>> from benchmarks.suite import run_benchmarks
        >>> rows = run_benchmarks(["kernel"], seconds=0, show=lambda line: None)  # doctest: +SKIP
    """
    unknown = set(levels) - LEVELS.keys()
    if unknown:
        raise ValueError(f"run_benchmarks: no level {', '.join(sorted(unknown))}; the levels are {', '.join(LEVELS)}")
    chosen = doctor.default_device() if device is None else torch.device(device)
    around = surroundings(chosen, command)
    show(doctor.environment(chosen))
    reason = why_not_compiled(chosen) if compiled else None
    if reason is not None:
        show(f"without torch.compile, which fails here: {reason}")
    rows = []
    for level in levels:
        for measured in LEVELS[level](chosen, seconds, compiled and reason is None):
            row = {**measured.to_json(), **around}
            show(line(row))
            rows.append(row)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    return rows


def line(row: dict) -> str:
    """One row as text: the time and the peak memory of each contender, and how many times faster than eager it is."""
    cells = [f"{row['what']}, {row['dtype']}, {row['size']}:"]
    for name, contender in row["contenders"].items():
        cell = f"{name} {contender['us']:,.1f} us"
        if name not in ("eager", "copy"):
            cell += f" ({contender['speedup']:.2f}x)"
        cells.append(cell)
    peaks = {name: values["peak_bytes"] / 1e6 for name, values in row["contenders"].items() if "peak_bytes" in values}
    cells += [f"memory {name} {peak:,.1f} MB" for name, peak in peaks.items()]
    return "  ".join(cells)
