"""Compares the loops as an arm64 processor runs them with the plain formula here: `make test-arm64`.

The C sources that need no Python are cross-compiled and run under an emulator of the processor. bfloat16 and float16
must have the plain formula's bits: every gate of the dtype with several ups, members of the family with and without
limits, columns side by side and apart, one thread and two. The gradient of gate may be off by as many steps as
docs/numerics.md says, once in 10,000 elements at most. float32 must be within the project's tolerance.

The rest of the extension, which needs Python, is compiled only.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hf_swiglu import reference
from hf_swiglu.reference import SILU, SWIGLU, GLUParams
from hf_swiglu.testing import why_not_close

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
CSRC = Path(__file__).parents[2] / "hf_swiglu" / "backends" / "csrc"
# As in setup.py.
FLAGS = ["-O3", "-fschedule-insns", "-ffp-contract=fast", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# In the order of csrc/kernels.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FAMILY = {
    "silu(gate) * up": SILU,
    "gate * silu(gate) * up": SWIGLU,
    "GPT-OSS": GLUParams(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
    "limits everywhere": GLUParams(power=2, gate_limit=6.5, act_limit=3.0, up_limit=2.0),
}
# Steps of the dtype by which the gradient of gate may be off.
STEPS = {SILU: 1, SWIGLU: 4}
# (threads, column stride)
WAYS = ((1, 1), (2, 1), (1, 2))


def main() -> int:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        print(f"missing: {', '.join(missing)}. On Debian and Ubuntu:", file=sys.stderr)
        print("  apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user", file=sys.stderr)
        return 2
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        driver = compiled(Path(folder))
        for dtype in DTYPES:
            for name, params in FAMILY.items():
                faults += compare(driver, dtype, name, params, True)
                if params.scalars()[1] is None:
                    faults += compare(driver, dtype, name.removesuffix(" * up"), params, False)
    for fault in faults:
        print("WRONG:", fault)
    print("equal to the plain formula" if not faults else f"{len(faults)} faults")
    return int(bool(faults))


def compiled(folder: Path) -> str:
    """The driver with the loops in it; what needs Python is compiled on the way."""
    sources = set(CSRC.glob("*.c"))
    python_headers = [file.name for file in CSRC.glob("*.h") if "Python.h" in file.read_text()]
    needs_python = sorted(file for file in sources if any(name in file.read_text() for name in python_headers))
    loops = sorted(sources - set(needs_python))
    driver, own = folder / "driver", Path(__file__).with_name("driver.c")
    subprocess.run([COMPILER, *FLAGS, f"-I{CSRC}", own, *loops, "-lm", "-o", driver], check=True)
    for file in needs_python:
        # Python's headers are those of this machine: right in what the stable interface uses of them.
        headers = sysconfig.get_path("include")
        subprocess.run([COMPILER, *FLAGS, "-c", "-fPIC", f"-I{headers}", file, "-o", folder / "unused.o"], check=True)
    print("run:          ", *(file.name for file in loops))
    print("compiled only:", *(file.name for file in needs_python), flush=True)
    return str(driver)


def compare(driver: str, dtype: torch.dtype, name: str, params: GLUParams, has_up: bool) -> list[str]:
    """What is wrong with the product and its gradients in one dtype, for one member of the family."""
    gate, up, grad = inputs(dtype)
    given = [gate, up] if has_up else [gate]
    expected = plain(given, grad, params)
    exact = plain([each.double() for each in given], grad.double(), params)
    names = ("product", "grad_gate", "grad_up")
    what = f"{str(dtype).removeprefix('torch.')}, {name}"
    faults = []
    for threads, stride in WAYS:
        found = emulated(driver, given, grad, params, threads, stride)
        for kind, *tensors in zip(names, found, expected, exact):
            fault = why_wrong(kind, *tensors, params)
            if fault is not None:
                faults.append(f"{what}, {kind}, {threads} threads, stride {stride}: {fault}")
    counts = [f"{kind} {unequal(*pair).sum():,}" for kind, *pair in zip(names, found, expected)]
    print(f"{what}: {gate.numel():,} elements; of other bits: {', '.join(counts)}", flush=True)
    return faults


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and the gradient of their product; rows of an odd length, so that the last vector is not whole."""
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.float32:
        gate = torch.randn(61, 4099, generator=generator) * 6
        gate[0, :9] = torch.tensor([0.0, -0.0, 88.7, -88.7, -87.4, -104.0, 1e-30, -1e-40, 100.0])
    else:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        gate = torch.cat([every, every[:3]]).repeat(8, 1)
    up, grad = (torch.randn(gate.shape, generator=generator).mul(3).to(dtype) for _ in range(2))
    return gate, up, grad


def plain(given: list[Tensor], grad: Tensor, params: GLUParams) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in given]
    product = reference.swiglu_fwd(leaves[0], leaves[1] if len(leaves) == 2 else None, params)
    return [product.detach(), *torch.autograd.grad(product, leaves, grad)]


def emulated(
    driver: str, given: list[Tensor], grad: Tensor, params: GLUParams, threads: int, stride: int
) -> list[Tensor]:
    """The product and its gradients, by the other processor."""
    gate, has_up = given[0], len(given) == 2
    # As csrc/module.c prepares them.
    limits = [in_dtype(limit, gate.dtype) for limit in (params.gate_limit, params.act_limit, params.up_limit)]
    below = [torch.tensor(limit).nextafter(torch.tensor(-math.inf)).item() for limit in limits]
    passes = limits if reference.clamp_passes_at_limit() else below
    floats = [params.alpha, *limits, in_dtype(params.up_offset, gate.dtype), *passes]
    numbers = [DTYPES.index(gate.dtype), variant(params, has_up), params.power, *gate.shape, stride, threads, has_up]
    results: list[Tensor] = []
    for direction, tensors in enumerate((given, [grad, *given])):
        command = [EMULATOR, "-L", LIBRARIES, driver, str(direction), *(str(int(each)) for each in numbers)]
        command += map(repr, floats)
        data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)
        done = subprocess.run(command, input=data, capture_output=True, check=True)
        results += torch.frombuffer(bytearray(done.stdout), dtype=gate.dtype).view(-1, *gate.shape)
    assert len(results) == 1 + len(given)
    return results


def variant(params: GLUParams, has_up: bool) -> int:
    """The loop that csrc/module.c chooses, in the order of csrc/kernels.h."""
    if params.scalars()[1] is not None or (params.power == 1 and not has_up):
        return 3
    if params.power == 1:
        return 0
    return 1 if has_up else 2


def in_dtype(limit: float, dtype: torch.dtype) -> float:
    return torch.tensor(limit, dtype=dtype).item()


def unequal(mine: Tensor, expected: Tensor) -> Tensor:
    """Where the bits differ; a NaN equals any other."""
    integer = torch.int32 if mine.dtype is torch.float32 else torch.int16
    return (mine.view(integer) != expected.view(integer)) & ~(mine.isnan() & expected.isnan())


def why_wrong(kind: str, mine: Tensor, expected: Tensor, exact: Tensor, params: GLUParams) -> str | None:
    if mine.dtype is torch.float32:
        return why_not_close(mine, expected, exact)
    differing = unequal(mine, expected)
    count = int(differing.sum())
    if count == 0:
        return None
    said = f"{count:,} of {mine.numel():,} differ in their bits"
    if kind != "grad_gate" or params not in STEPS:
        return said
    steps = steps_apart(mine[differing], expected[differing])
    return said if steps > STEPS[params] or count > mine.numel() * 1e-4 else None


def steps_apart(mine: Tensor, expected: Tensor) -> int:
    bits = [each.view(torch.int16).int() for each in (mine, expected)]
    ordered = [torch.where(each < 0, -(each & 0x7FFF), each) for each in bits]
    return int((ordered[0] - ordered[1]).abs().max())


if __name__ == "__main__":
    sys.exit(main())
