"""Measures the largest error of SiLU in float32 over all 2^32 gates: the CPU kernels', and PyTorch's own.

In units in the last place; the exact result is computed in float64. About 10 minutes for each CPU capability on two
cores. `make test-every-float`.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_swiglu.backends import _cpu_kernels, cpu
from hf_swiglu.reference import SILU

CHUNK = 2**22
SMALLEST = 2.0**-149


def errors(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| in units in the last place of float32 numbers of exact's size."""
    exponent = torch.frexp(exact).exponent
    unit = torch.ldexp(torch.ones_like(exact), exponent - 24).clamp(min=SMALLEST)
    return (result.double() - exact).abs() / unit


def largest(capability: str) -> dict[str, tuple[float, float]]:
    """For each implementation: (largest error, its gate), over all gates whose result is finite."""
    _cpu_kernels.use_cpu_capability(capability)
    worst = {capability: (0.0, 0.0), "PyTorch": (0.0, 0.0)}
    out = torch.empty(CHUNK)
    for start in range(-(2**31), 2**31, CHUNK):
        gate = torch.arange(start, start + CHUNK).to(torch.int32).view(torch.float32)
        exact = gate.double() / (1 + torch.exp(-gate.double()))
        finite = exact.isfinite() & (exact.abs() <= torch.finfo(torch.float32).max)
        if not finite.any():
            continue
        cpu.swiglu_fwd(gate, None, out, SILU)
        for name, result in zip(worst, (out, F.silu(gate))):
            error = torch.where(finite, errors(result, exact), 0.0)
            at = int(error.argmax())
            if error[at] > worst[name][0]:
                worst[name] = float(error[at]), float(gate[at])
    return worst


def main() -> None:
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads\n")
    print("| SiLU in float32 | largest error, ulp | at gate |\n| --- | --- | --- |", flush=True)
    for capability in sys.argv[1:] or _cpu_kernels.supported_cpu_capabilities():
        for name, (error, gate) in largest(capability).items():
            print(f"| {name} | {error:.2f} | {gate!r} |", flush=True)


if __name__ == "__main__":
    main()
