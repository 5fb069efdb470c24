"""The format of the rows: one JSON object on a line, with device, versions and commit."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from hf_swiglu import __version__, available_backends
from hf_swiglu.commands import doctor
from hf_swiglu.commands.timing import Ratio, Times


@dataclass(frozen=True)
class Case:
    """What was measured: "kernel", "forward", "bfloat16", "16 x 8192"."""

    level: str
    what: str
    dtype: str
    size: str


@dataclass(frozen=True)
class Row:
    """One case with all of its contenders; `eager` is always among them."""

    case: Case
    times: dict[str, Times]
    # The bytes that must move, in copies of one tensor; 0 where arithmetic decides.
    copies: float = 0.0
    peak_bytes: dict[str, int] | None = None

    def to_json(self) -> dict[str, object]:
        eager = self.times["eager"]
        contenders = {}
        for name, times in self.times.items():
            contenders[name] = {
                "us": round(times.median * 1e6, 3),
                "quartiles_us": [round(quartile * 1e6, 3) for quartile in times.quartiles],
                "rounds": len(times.rounds),
                "speedup": round(Ratio.of(eager, times).median, 3),
            }
            if self.copies and name != "copy":
                # 1 means that it takes no longer than moving its bytes does.
                floor = self.copies * self.times["copy"].median
                contenders[name]["share_of_copy_bandwidth"] = round(floor / times.median, 3)
            if self.peak_bytes and name in self.peak_bytes:
                contenders[name]["peak_bytes"] = self.peak_bytes[name]
        return {**asdict(self.case), "contenders": contenders}


def surroundings(device: torch.device, command: str) -> dict[str, object]:
    """Where and how a row was measured."""
    kernel = doctor.serving_backend(device.type, torch.float32, available_backends())
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "kernel": kernel.detail,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_swiglu": __version__,
        "commit": _commit(),
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read(files: Iterable[Path]) -> list[dict]:
    """The rows of several files, the last of each case on each machine.

    Raises:
        ValueError: a line that is no row, named by file and number.
    """
    latest: dict[tuple, dict] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                key = (*machine(row), *(row[name] for name in ("level", "what", "dtype", "size")))
                row["contenders"]["eager"]["us"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is no row of the benchmarks: {error!r}") from error
            # Removed first, so that the order is that of the last measurements.
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values())


def machine(row: dict) -> tuple[str, str]:
    """Device and kernel, which compared rows must share; one processor name may stand for several generations."""
    return row["device"], row["kernel"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.machine()
    return f"{said['model name']} (family {said.get('cpu family')}, model {said.get('model')})"


def _commit() -> str:
    """The commit of this code, with "+" for uncommitted changes; "" outside a repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "*.py", "*.[ch]") else ""
        )
    except OSError:
        return ""
