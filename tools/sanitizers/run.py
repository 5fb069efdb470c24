"""Runs the C kernels under sanitizers: `make test-sanitizers`.

The loops, without Python, in every CPU capability of this processor (driver.c): under AddressSanitizer with
UndefinedBehaviorSanitizer, and under ThreadSanitizer. Then the whole extension, with the part that reads tensors, under
the first two: the tests of the CPU kernel, in a Python with the sanitizers' library preloaded.

ThreadSanitizer does not see libgomp's barriers and would report every parallel region. The driver therefore defines the
three functions of OpenMP that the loops call, with POSIX threads; the code of the parallel region is the same.

Faults are then made in copies of the sources, one at a time, and each has to be reported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "hf_swiglu" / "backends" / "csrc"
DRIVER = Path(__file__).with_name("driver.c")
COMPILER = os.environ.get("CC", "gcc")
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=fast", "-fopenmp", "-fno-sanitize-recover=all"]
MEMORY, THREADS = "address,undefined", "thread"
TESTS = ["tests/test_cpu_kernel.py", "tests/test_dlpack.py"]


class Fault(NamedTuple):
    """A change of a source that makes it wrong, and the words of the report."""

    what: str
    sanitizer: str
    file: str
    right: str
    wrong: str
    report: str


FAULTS = [
    Fault(
        "one element more is written after the last", MEMORY, "loops.h",
        "memcpy(operands[i] + whole * size, tail[i], bytes)",
        "memcpy(operands[i] + whole * size, tail[i], bytes + size)",
        "heap-buffer-overflow",
    ),
    Fault(
        "a whole block is read where a part of one is left", MEMORY, "loops.h",
        "memcpy(tail[i], operands[i] + whole * size, bytes)",
        "memcpy(tail[i], operands[i] + whole * size, sizeof buffers[i])",
        "buffer-overflow",
    ),
    Fault(
        "strided columns are gathered into a buffer that is too small", MEMORY, "launch.c",
        "buffers[MAX_OPERANDS][GATHERED]", "buffers[MAX_OPERANDS][1]",
        "buffer-overflow",
    ),
    Fault(
        "a shift by more bits than there are", MEMORY, "launch.c",
        "int64_t total = launch->rows * launch->columns;",
        "int64_t total = launch->rows * launch->columns;\n    volatile int bit = 1 << (total & 63);\n    (void)bit;",
        "left shift of 1 by 31 places",
    ),
    Fault(
        "two threads write the same elements", THREADS, "launch.c",
        "end = begin + share;", "end = begin + share + 64;", "data race",
    ),
    Fault(
        "a counter that all threads share", THREADS, "launch.c",
        "int64_t row = begin / launch->columns, column",
        "static int64_t ranges;\n    ranges++;\n    int64_t row = begin / launch->columns, column",
        "data race",
    ),
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    if shutil.which(COMPILER) is None:
        print(f"missing: {COMPILER}, a C compiler with AddressSanitizer and ThreadSanitizer", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failed = [sanitizer for sanitizer in (MEMORY, THREADS) if not loops_pass(folder, sanitizer)]
        missed = [fault.what for fault in FAULTS if not is_reported(folder, fault)]
        if not extension_passes(folder):
            failed.append("the extension")
    for what in failed:
        print("REPORTED:", what)
    for what in missed:
        print("NOT REPORTED, and it should be:", what)
    print("nothing is reported, and every fault that is made is" if not failed + missed else "failed")
    return int(bool(failed + missed))


def loops_pass(folder: Path, sanitizer: str) -> bool:
    print(f"the loops, -fsanitize={sanitizer}:", flush=True)
    done = run(compiled(folder, CSRC, sanitizer))
    print(done.stdout + done.stderr, end="", flush=True)
    return done.returncode == 0


def is_reported(folder: Path, fault: Fault) -> bool:
    """Whether the sanitizer stops a driver that is compiled with the fault, with its report; in one capability."""
    sources = folder / "faulty"
    shutil.copytree(CSRC, sources)
    kernels = sources / "kernels.h"
    kernels.write_text(kernels.read_text().replace("#if defined(__x86_64__)", "#if 0"))
    file = sources / fault.file
    text = file.read_text()
    if text.count(fault.right) != 1:
        raise RuntimeError(
            f"{fault.file} has changed: {fault.right!r} is there {text.count(fault.right)} times, not once"
        )
    file.write_text(text.replace(fault.right, fault.wrong))
    done = run(compiled(folder, sources, fault.sanitizer))
    shutil.rmtree(sources)
    reported = done.returncode != 0 and fault.report in done.stderr
    print(f"{'reported' if reported else 'NOT REPORTED'}: {fault.what}", flush=True)
    return reported


def compiled(folder: Path, sources: Path, sanitizer: str) -> Path:
    """The driver with the sources that need no Python, compiled side by side."""
    loops = [file for file in sorted(sources.glob("*.c")) if "dlpack_tensors.h" not in file.read_text()]
    flags = [*FLAGS, f"-fsanitize={sanitizer}", f"-I{sources}"]
    objects = [folder / f"{file.stem}.o" for file in (DRIVER, *loops)]
    running = [
        subprocess.Popen([COMPILER, *flags, "-c", file, "-o", target])
        for file, target in zip((DRIVER, *loops), objects)
    ]
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise RuntimeError(f"{COMPILER} cannot compile the loops with -fsanitize={sanitizer}")
    # Without -fopenmp: the driver itself defines what the loops call.
    program = folder / "driver"
    subprocess.run([COMPILER, f"-fsanitize={sanitizer}", *objects, "-lm", "-lpthread", "-o", program], check=True)
    return program


def run(program: Path) -> subprocess.CompletedProcess:
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, env=os.environ | options)


def extension_passes(folder: Path) -> bool:
    """The tests of the CPU kernel, with the extension compiled under the sanitizers."""
    print(f"the extension, -fsanitize={MEMORY}:", flush=True)
    library = folder / "_cpu_kernels.abi3.so"
    headers = f"-I{sysconfig.get_path('include')}"
    flags = [*FLAGS, f"-fsanitize={MEMORY}", "-shared", "-fPIC", "-fvisibility=hidden", headers]
    subprocess.run([COMPILER, *flags, *sorted(CSRC.glob("*.c")), "-o", library], check=True)
    preload = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        # Python and PyTorch themselves never free what they need to the end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "HF_SWIGLU_SANITIZED": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.sanitizers.extension", "-m", "not slow", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
