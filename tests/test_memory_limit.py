"""A training step that does not fit into memory unpatched, and does in tiles: processes with a limit of their own."""

import os
import subprocess
import sys

import pytest
from support.kernel import needs_kernel

pytest.importorskip("resource", reason="this system limits no process's memory")

# Four MLPs whose buffers have 64 MiB each: unpatched they keep 1 GiB for backward.
SCRIPT = """
import resource
import sys
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from hf_swiglu import patch_model

torch.manual_seed(0)
config = LlamaConfig(hidden_size=128, intermediate_size=4096)
model = nn.Sequential(*(LlamaMLP(config) for _ in range(4)))
if sys.argv[1] == "tiled":
    patch_model(model, tile=256)
hidden_states = torch.randn(4096, 128)
# A small step first: kernels, threads and gradients are there then.
model(hidden_states[:64]).sum().backward()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20, -1))
model(hidden_states).square().mean().backward()
print("finished", all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs limits that are kept")
@pytest.mark.parametrize("setting", ["unpatched", pytest.param("tiled", marks=needs_kernel)])
def test_a_step_with_512_mib(setting):
    # Freed tensors go back to the system at once. glibc's heap would keep what lies between tensors that are kept.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", SCRIPT, setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if setting == "tiled":
        assert done.returncode == 0, done.stderr
        assert done.stdout == "finished True\n"
    else:
        assert done.returncode != 0 and "memory" in done.stderr, done.stderr
