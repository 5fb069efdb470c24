"""Draws a chart of the rows of each device type, and writes the tables between markers in Markdown pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import long_sequences, memory_chart
from benchmarks.result_rows import machine, read

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

_HEADS = {
    "kernel": "| what | dtype | size | eager | ours | | into existing memory | | of copy bandwidth | others |",
    "mlp": "| what | dtype | MLP | eager | ours | | memory, eager | ours | others |",
    "model": "| what | dtype | model | eager | ours | | memory, eager | ours | others |",
    "long": f"| sequence | {' | '.join(long_sequences.SETTINGS)} |",
}


def plot(files: Sequence[Path], *, folder: Path, pages: Iterable[Path] = ()) -> list[Path]:
    """Draw one chart for each type of device, and write the tables into pages.

    Args:
        files: the output of `measure --rows`. For each type of device, only the machine measured last is shown, with
            the last row of each case.
        folder: where the charts go, as `cpu.png` and `cpu_long_sequences.png`, or `cuda.png`.
        pages: Markdown files; the text between `<!-- table: LEVEL -->` and `<!-- end of table -->` is replaced.

    Returns:
        The charts.

    Raises:
        ValueError: a file holds no rows.
        FileNotFoundError: a file or a page does not exist.

    Example:
        >>> from pathlib import Path
        >>> from benchmarks.charts import plot
        >>> plot([Path("benchmarks/results/rows.jsonl")], folder=Path("benchmarks/results"))  # doctest: +SKIP
    """
    rows = _rows_of_last_machines(read(files))
    if not rows:
        raise ValueError(f"plot: no rows in {', '.join(map(str, files))}; write some with `measure --rows FILE`")
    texts = {page: _with_tables(page.read_text(encoding="utf-8"), rows) for page in pages}
    folder.mkdir(parents=True, exist_ok=True)
    charts = []
    for device_type in dict.fromkeys(row["device_type"] for row in rows):
        of_device = [row for row in rows if row["device_type"] == device_type]
        if any(row["level"] != "long" for row in of_device):
            charts.append(folder / f"{device_type}.png")
            _draw(of_device, charts[-1])
        long_rows = [row for row in of_device if row["level"] == "long"]
        if long_rows:
            charts.append(folder / f"{device_type}_long_sequences.png")
            memory_chart.draw(long_rows, charts[-1])
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    return charts


def _rows_of_last_machines(rows: Sequence[dict]) -> list[dict]:
    last = {row["device_type"]: machine(row) for row in rows}
    return [row for row in rows if machine(row) == last[row["device_type"]]]


def table(rows: Sequence[dict], level: str) -> str:
    """One level's rows as Markdown: a heading line and a table for each device."""
    chosen = [row for row in rows if row["level"] == level]
    parts = []
    for device in dict.fromkeys(row["device"] for row in chosen):
        own = [row for row in chosen if row["device"] == device]
        newest = own[-1]
        parts.append(
            f"{device}, {newest['kernel']}; torch {newest['torch']}, transformers {newest['transformers']}, "
            f"commit {', '.join(dict.fromkeys(row['commit'] for row in own))}:\n"
        )
        head = _HEADS[level]
        parts += [head, "| --- " * (head.count("|") - 1) + "|"]
        parts += ["| " + " | ".join(_cells(row)) + " |" for row in own]
        parts.append("")
    return "\n".join(parts)


def _cells(row: dict) -> list[str]:
    contenders = row["contenders"]
    if row["level"] == "long":
        # Peak memory, and the time in parts of eager's.
        cells = [f"{each['peak_bytes'] / 1e6:,.0f} MB, {1 / each['speedup']:.2f}" for each in contenders.values()]
        return [row["size"], *cells]
    eager, ours = contenders["eager"], contenders["ours"]
    cells = [row["what"], row["dtype"], row["size"], _time(eager["us"]), _time(ours["us"]), f"{ours['speedup']:.2f}x"]
    if row["level"] != "kernel":
        memory = [f"{contender['peak_bytes'] / 1e6:,.1f} MB" for contender in (eager, ours)]
        return [*cells, *memory, _others(contenders)]
    into = contenders.get("into")
    best = into or ours
    share = best.get("share_of_copy_bandwidth")
    return [
        *cells,
        _time(into["us"]) if into else "",
        f"{into['speedup']:.2f}x" if into else "",
        f"{share:.0%}" if share else "",
        _others(contenders),
    ]


def _others(contenders: dict) -> str:
    """The speedups of the other contenders over eager."""
    names = contenders.keys() - {"eager", "ours", "into", "copy"}
    return ", ".join(f"{name} {contenders[name]['speedup']:.2f}x" for name in sorted(names))


def _time(microseconds: float) -> str:
    return f"{microseconds:,.1f} us" if microseconds < 1000 else f"{microseconds / 1000:,.2f} ms"


def _with_tables(text: str, rows: Sequence[dict]) -> str:
    return _MARKED.sub(lambda match: f"{match[1]}{table(rows, match[2])}{match[3]}", text)


def _draw(rows: Sequence[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kernels = [row for row in rows if row["level"] == "kernel" and _has_work(row)]
    wholes = [row for row in rows if row["level"] in ("mlp", "model")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 0.23 * max(len(kernels), 2 * len(wholes)) + 2))
    _bars(left, kernels, {"ours": "new memory, both", "into": "existing memory, both"}, _speedup)
    left.set_title("kernel: times faster than eager PyTorch")
    _bars(right, wholes, {"time": "time", "memory": "peak memory"}, _relative)
    right.set_title("MLP and model: part of eager's (less is better)")
    for axes in (left, right):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.legend(loc="upper right")
        axes.margins(y=0.01)
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _bars(axes, rows: Sequence[dict], series: dict[str, str], value) -> None:
    height = 0.8 / len(series)
    for number, (name, label) in enumerate(series.items()):
        places = [place + (number - 0.5) * height for place in range(len(rows))]
        axes.barh(places, [value(row["contenders"], name) for row in rows], height, label=label)
    axes.set_yticks(range(len(rows)), [f"{row['what']}, {row['dtype']}, {row['size']}" for row in rows], fontsize=7)


def _speedup(contenders: dict, name: str) -> float:
    eager = "eager into" if name == "into" else "eager"
    # A missing contender has no bar.
    return contenders[eager]["us"] / contenders[name]["us"] if {eager, name} <= contenders.keys() else 0


def _relative(contenders: dict, name: str) -> float:
    if name == "time":
        return 1 / contenders["ours"]["speedup"]
    return contenders["ours"]["peak_bytes"] / contenders["eager"]["peak_bytes"]


def _has_work(row: dict) -> bool:
    # With a single row the overhead of the call is measured, not the kernel.
    return not row["size"].startswith("1 x")
