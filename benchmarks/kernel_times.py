"""Times the kernels against eager PyTorch, and optionally torch.compile, in one run.

    python benchmarks/kernel_times.py                       # the table, on the GPU if there is one
    python benchmarks/kernel_times.py --compile --json times.jsonl

Contenders take turns, so that whatever slows the machine down slows all of them; the table shows medians. `at once`
is ours with new memory for the results, as eager has to do it too; `into` is ours into existing memory. `bytes` is
the time of `into` over the least that moving its bytes can take: 1.5 copies of a tensor forward, 2.5 backward.
A result that is farther from float64 than the tests allow is an error, not a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tolerance import assert_close_to_float64

import hf_swiglu
from hf_swiglu import _ops, available_backends

SHAPES = ((1, 1536), (1, 8192), (16, 1536), (16, 8192), (512, 1536), (2048, 11008))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("eager", "compile", "at once", "into", "copy")

# How many copies of one tensor the bytes of a kernel amount to: (reads + writes) / 2.
COPIES = {"forward": 1.5, "backward": 2.5, "self-gated": 1.0}


def eager_function(direction: str, gate: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    if direction == "forward":
        return lambda grad, gate, up: (F.silu(gate) * up,)
    if direction == "self-gated":
        return lambda grad, gate, up: (gate * F.silu(gate),)
    # What autograd runs for eager's forward, which has kept swish(gate): computing it again would flatter us.
    kept = F.silu(gate)
    return lambda grad, gate, up: (torch.ops.aten.silu_backward(grad * up, gate), grad * kept)


def exact_results(direction: str, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    grad, gate, up = grad.double(), gate.double().requires_grad_(), up.double().requires_grad_()
    if direction == "self-gated":
        return ((gate * F.silu(gate)).detach(),)
    out = F.silu(gate) * up
    return (out.detach(),) if direction == "forward" else torch.autograd.grad(out, (gate, up), grad)


def ours_into(direction: str, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    grad, gate, up = operands
    if direction == "forward":
        _ops.product(gate, up, *results)
    elif direction == "backward":
        _ops.product_backward(grad, gate, up, *results)
    else:
        _ops.product(gate, None, *results, 2)
    return results


def contenders(direction: str, operands: tuple[Tensor, ...], compiled: bool) -> dict[str, Callable[[], object]]:
    _, gate, _ = operands
    eager = eager_function(direction, gate)
    outputs = 2 if direction == "backward" else 1
    existing = tuple(torch.empty_like(gate) for _ in range(outputs))
    chosen: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(*operands),
        "at once": lambda: ours_into(direction, operands, tuple(torch.empty_like(gate) for _ in range(outputs))),
        "into": lambda: ours_into(direction, operands, existing),
        "copy": lambda: existing[0].copy_(gate),
    }
    if compiled:
        fused = torch.compile(eager)
        chosen["compile"] = lambda: fused(*operands)
    if direction == "self-gated":
        chosen["gelu erf"] = lambda: F.gelu(gate)
        chosen["gelu tanh"] = lambda: F.gelu(gate, approximate="tanh")
    return chosen


def check(direction: str, operands: tuple[Tensor, ...], chosen: dict[str, Callable[[], object]]) -> None:
    for ours in ("at once", "into"):
        triples = zip(chosen[ours](), chosen["eager"](), exact_results(direction, *operands), strict=True)
        for result, eager, exact in triples:
            assert_close_to_float64(result, eager, exact)


def take_turns(chosen: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """The median time of each contender in microseconds."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[int]] = {name: [] for name in chosen}
    for function in chosen.values():
        function()
    synchronize()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["eager"]) < 5:
        for name, function in chosen.items():
            start = time.perf_counter_ns()
            function()
            synchronize()
            times[name].append(time.perf_counter_ns() - start)
    return {name: statistics.median(values) / 1000 for name, values in times.items()}


def measure(shape: tuple[int, int], name: str, direction: str, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    operands = tuple(torch.randn(shape, device=options.device).to(DTYPES[name]) for _ in range(3))
    chosen = contenders(direction, operands, options.compile)
    check(direction, operands, chosen)
    times = take_turns(chosen, options.seconds, options.device)
    return {"shape": list(shape), "dtype": name, "direction": direction, "us": times}


def line(row: dict) -> str:
    us = row["us"]
    cells = [f"{'x'.join(map(str, row['shape'])):>10} {row['dtype']:>8} {row['direction']:>10}"]
    cells += [f"{us[name]:>10.1f}" if name in us else f"{'-':>10}" for name in COLUMNS]
    cells += [f"{us['eager'] / us['at once']:>10.2f}", f"{us['eager'] / us['into']:>9.2f}"]
    cells.append(f"{us['into'] / us['copy'] / COPIES[row['direction']]:>7.2f}")
    cells += [f"  {name} {us[name]:.1f}" for name in us if name.startswith("gelu")]
    return "".join(cells)


def surroundings(device: str) -> dict:
    def git(*command: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True).stdout.strip()

    kernel = next(backend for backend in available_backends() if device in backend.devices)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "kernel": kernel.detail,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hf_swiglu": hf_swiglu.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="time torch.compile of eager's code too; slow to start")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each line of the table")
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object per line")
    options = parser.parse_args()

    around = surroundings(options.device)
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    header = "".join(f"{name:>10}" for name in COLUMNS) + f"{'x at once':>10}{'x into':>9}{'bytes':>7}"
    print(f"{'us':>10} {'dtype':>8} {'':>10}{header}")
    for shape in SHAPES:
        for name in DTYPES:
            for direction in COPIES:
                row = measure(shape, name, direction, options)
                print(line(row), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps({**row, **around}) + "\n")


if __name__ == "__main__":
    main()
