"""Compares the CPU kernels with eager PyTorch on all 2^32 pairs of 16-bit numbers, for each CPU capability.

    forward     every gate with every up
    backward    every gate with every gradient of the activation (up is 1): grad_gate, and grad_up with every grad

It prints a row of a Markdown table for each case, and exits with 1 if any bit of a product or of grad_up differs, if
more than 1 in 10,000 of grad_gate do, or if grad_gate is ever more than one step of the dtype off where swish gates:
with a self-gated gate two terms may nearly cancel. `make test-every-pair`, or a part of it:

    python tools/every_pair.py "AVX-512 FP16" --dtype float16 --form GPT-OSS
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from hf_swiglu import reference
from hf_swiglu.backends import _cpu_kernels, cpu
from hf_swiglu.commands.console import progress
from hf_swiglu.reference import SILU, SWIGLU, GLUParams

FORMS = {
    "silu(gate) * up": SILU,
    "gate * silu(gate) * up": SWIGLU,
    "GPT-OSS": GLUParams(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
}
# Gates at a time: 2^20 pairs fit in a cache.
CHUNK = 16


def every(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def differing(result: Tensor, expected: Tensor) -> tuple[int, int]:
    """(number of differing elements, largest difference in steps of the dtype); NaN equals NaN with any payload."""
    unequal = result.view(torch.int16) != expected.view(torch.int16)
    if not unequal.any():
        return 0, 0
    result, expected = result[unequal], expected[unequal]
    both = result.isnan() & expected.isnan()
    if (result.isnan() != expected.isnan()).any():
        return int((~both).sum()), 2**16
    bits = [tensor[~both].view(torch.int16).int() for tensor in (result, expected)]
    ordered = [torch.where(each < 0, -(each & 0x7FFF) - 1, each) for each in bits]
    steps = (ordered[0] - ordered[1]).abs()
    return steps.numel(), int(steps.max()) if steps.numel() else 0


def compare(params: GLUParams, dtype: torch.dtype, capabilities: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """For each capability, product and gradient: (number of pairs that differ, largest difference in steps)."""
    numbers = every(dtype)
    worst = {each: dict.fromkeys(("product", "grad_gate", "grad_up"), (0, 0)) for each in capabilities}
    second = numbers.expand(CHUNK, -1).contiguous()
    ones = torch.ones_like(second)
    outs = [torch.empty_like(second) for _ in range(3)]
    for gates in progress(numbers.split(CHUNK), f"{dtype}, {params}"):
        gate = gates[:, None].expand(-1, len(numbers)).contiguous()
        leaves = [gate.detach().requires_grad_(), ones.detach().requires_grad_()]
        expected = [reference.swiglu_fwd(gate, second, params)]
        expected += torch.autograd.grad(reference.swiglu_fwd(*leaves, params), leaves, second)
        for capability, found in worst.items():
            _cpu_kernels.use_cpu_capability(capability)
            cpu.swiglu_fwd(gate, second, outs[0], params)
            cpu.swiglu_bwd(second, gate, ones, outs[1], outs[2], params)
            for name, mine, plain in zip(found, outs, expected):
                count, steps = differing(mine, plain)
                found[name] = found[name][0] + count, max(found[name][1], steps)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the CPU kernels with eager PyTorch on all 2^32 pairs.")
    supported, dtypes = _cpu_kernels.supported_cpu_capabilities(), ("bfloat16", "float16")
    parser.add_argument("capabilities", nargs="*", default=supported, help=f"out of {supported}; all by default")
    parser.add_argument("--dtype", choices=dtypes, action="append", help="both by default")
    parser.add_argument("--form", choices=FORMS, action="append", help="all by default")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads\n")
    print("| dtype | form | CPU capability | products that differ | grad_up | grad_gate | by at most |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    failed = False
    start = time.perf_counter()
    for dtype in arguments.dtype or dtypes:
        for form in arguments.form or FORMS:
            for capability, found in compare(FORMS[form], getattr(torch, dtype), arguments.capabilities).items():
                product, grad_up, grad_gate = (found[each][0] for each in ("product", "grad_up", "grad_gate"))
                steps = found["grad_gate"][1]
                row = [dtype, form, capability, product, grad_up, grad_gate, f"{steps} steps"]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
                failed |= bool(product or grad_up) or grad_gate > 2**32 * 1e-4
                failed |= steps > 1 and FORMS[form].power == 1
    print(f"\n{(time.perf_counter() - start) / 60:.0f} minutes")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
