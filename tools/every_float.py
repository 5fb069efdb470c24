"""Measures the largest error of SiLU in float32 over all gates from -87: the CPU kernels', and PyTorch's own.

In units in the last place of the exact result, which float64 stands for: 3 minutes on two cores. Below -88.7,
where e^-gate is infinite, PyTorch and the kernels return -0 in place of numbers up to 3e-37.
`make test-every-float`, or for some CPU capabilities

    python tools/every_float.py "AVX-512" AVX2
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_swiglu.backends import _cpu_kernels, cpu
from hf_swiglu.reference import SILU

CHUNK = 2**20
LOWEST = -87.0
SMALLEST = 2.0**-149
EXPONENT = 0x7FF << 52


def units(exact: Tensor) -> Tensor:
    """The unit in the last place of float32 numbers of the size of float64 numbers."""
    return ((exact.view(torch.int64) & EXPONENT).view(torch.float64) * 2.0**-23).clamp_(min=SMALLEST)


def largest(capabilities: list[str]) -> dict[str, tuple[float, float]]:
    """For PyTorch and each capability: (largest error, its gate), over all gates from LOWEST with a finite result."""
    worst = dict.fromkeys(["PyTorch", *capabilities], (0.0, 0.0))
    out = torch.empty(CHUNK)
    for start in range(-(2**31), 2**31, CHUNK):
        gate = torch.arange(start, start + CHUNK).to(torch.int32).view(torch.float32)
        exact = gate.double() / (1 + torch.exp(-gate.double()))
        compared = (gate >= LOWEST) & (exact <= torch.finfo(torch.float32).max)
        if not compared.any():
            continue
        unit = units(exact)
        for name in worst:
            result = F.silu(gate) if name == "PyTorch" else out
            if result is out:
                _cpu_kernels.use_cpu_capability(name)
                cpu.swiglu_fwd(gate, None, out, SILU)
            error = torch.where(compared, (result.double() - exact).abs() / unit, 0.0)
            at = int(error.argmax())
            if error[at] > worst[name][0]:
                worst[name] = float(error[at]), float(gate[at])
    return worst


def main() -> None:
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads\n")
    print("| SiLU in float32 | largest error, ulp | at gate |\n| --- | --- | --- |", flush=True)
    for name, (error, gate) in largest(sys.argv[1:] or _cpu_kernels.supported_cpu_capabilities()).items():
        print(f"| {name} | {error:.2f} | {gate!r} |")


if __name__ == "__main__":
    main()
