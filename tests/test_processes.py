"""Forked and spawned processes, the number of threads, and the one OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_swiglu import backends, swiglu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's /proc"),
    pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"no CPU kernel: {backends.unavailable('cpu')}"),
]


class Products(Dataset):
    """Products that a worker computes, of tensors of which two threads would share the work."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        gate = torch.full((300, 256), float(index))
        return swiglu(gate, gate)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ("fork", "spawn"))
@pytest.mark.usefixtures("two_threads")
def test_workers_of_a_data_loader_call_the_kernel(method):
    # The pool of threads is in use in the parent before it forks.
    expected = [Products()[index] for index in range(4)]
    loader = DataLoader(Products(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=200)
    assert all(map(torch.equal, loader, expected))


# Prints how a forked child ends that computes with two threads after its parent did: 0, or the signal that ends a wait.
FORK = """
import os, signal, sys, torch, hf_swiglu
torch.set_num_threads(2)
x = torch.ones(2000, 256)
call = (lambda: hf_swiglu.swiglu(x, x)) if sys.argv[1] == "ours" else (lambda: torch.nn.functional.silu(x) * x)
call()
child = os.fork()
if child == 0:
    signal.alarm(8)
    call()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.long
def test_a_forked_child_fares_as_with_pytorch():
    ends = {which: in_child(FORK, which) for which in ("ours", "plain")}
    # libgomp's threads are not there after a fork, and its pool waits for them: PyTorch's own operators hang as well.
    assert ends["ours"] == ends["plain"]


# Prints how many threads a product adds to the process.
COUNT = """
import os, sys, time, torch, hf_swiglu
torch.set_num_threads(int(sys.argv[1]))
# Not filled: PyTorch would start its threads for that.
x = torch.empty(8000, 256)
hf_swiglu.swiglu(x[:40], x[:40])
# Threads that importing started end.
time.sleep(2)
before = len(os.listdir("/proc/self/task"))
hf_swiglu.swiglu(x, x)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("threads", (1, 2, 5))
def test_the_kernel_runs_on_as_many_threads_as_pytorch_is_told(threads):
    assert in_child(COUNT, str(threads)) == str(threads - 1)


RUNTIMES = """
import os, re, sys
for name in sys.argv[1:]:
    __import__(name)
import torch, hf_swiglu
torch.set_num_threads(2)
x = torch.ones(2000, 256)
hf_swiglu.swiglu(x, x).exp()
libraries = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if re.search(r"lib[gi]?omp", line)}
print(len(libraries))
"""


@pytest.mark.parametrize(
    "order", ("hf_swiglu", "torch hf_swiglu", "hf_swiglu.backends._cpu_kernels torch", "numpy transformers hf_swiglu")
)
def test_there_is_one_openmp_runtime_whatever_is_imported_first(order):
    assert in_child(RUNTIMES, *order.split()) == "1"


def in_child(script: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
