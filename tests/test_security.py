"""What SECURITY.md says: importing and patching connect to nothing, write nothing, start and unpickle nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import tiny_llama, tiny_phi3

import hf_swiglu
from hf_swiglu import backends, patch_model
from hf_swiglu.patching.rewriting.fused_classes import FusedModule

PACKAGE = Path(hf_swiglu.__file__).parent

# Prints what audit hooks (https://docs.python.org/3/library/audit_events.html) report of importing hf_swiglu, of
# every way to patch, and of a training step; and at the end, what it reports of a file that is written on purpose.
AUDIT = """
import os, sys, tempfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=64, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=128,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2)
model, tokens = LlamaForCausalLM(config), torch.ones(2, 40, dtype=torch.long)
model(tokens, labels=tokens).loss.backward()
folder = tempfile.mkdtemp()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FAMILIES = ("socket.", "subprocess.", "pickle.", "urllib.", "http.", "shutil.", "tempfile.")
CALLS = ("mkdir", "remove", "rename", "link", "symlink", "truncate", "chmod", "system", "exec", "fork", "forkpty",
         "posix_spawn", "putenv", "unsetenv")
seen = []

def hook(event, arguments):
    if event == "open":
        if arguments[2] is not None and arguments[2] & WRITES and arguments[0] != os.devnull:
            seen.append((event, arguments[0]))
    elif event.startswith(FAMILIES) or event in ["os." + call for call in CALLS]:
        seen.append((event, *map(str, arguments)))

sys.addaudithook(hook)
import hf_swiglu
for options in ({}, {"keep": 0}, {"tile": 16}, {"activation": "swiglu"}, {"verify": True}):
    hf_swiglu.patch_model(model, **options)
    model(tokens, labels=tokens).loss.backward()
    hf_swiglu.unpatch_model(model)
with hf_swiglu.patch_on_load():
    LlamaForCausalLM(config)(tokens)
print(seen)
seen.clear()
open(os.path.join(folder, "on purpose"), "w").close()
os.remove(os.path.join(folder, "on purpose"))
import socket
socket.socket().close()
print([event for event, *_ in seen])
"""


@pytest.mark.slow
def test_importing_and_patching_touch_nothing_outside_the_process():
    # Python itself would write what it has compiled.
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment = online | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", AUDIT], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    nothing, on_purpose = done.stdout.strip().splitlines()
    assert nothing == "[]"
    assert on_purpose == "['open', 'os.remove', 'socket.__new__']"


@pytest.mark.parametrize("build", (tiny_llama, tiny_phi3))
def test_rewritten_code_has_the_globals_of_the_original(build):
    model = build()
    patch_model(model)
    modules = [module for module in model.modules() if isinstance(module, FusedModule)]
    assert modules
    for module in modules:
        original = type(module)._swiglu_original.forward
        rewritten = type(module).forward
        assert rewritten is not original
        assert rewritten.__globals__ is original.__globals__
        assert rewritten.__code__.co_filename == original.__code__.co_filename


def test_the_compiled_kernel_is_in_the_package_and_not_writable_by_other_users():
    if backends.unavailable("cpu"):
        pytest.skip(f"no CPU kernel: {backends.unavailable('cpu')}")
    from hf_swiglu.backends import _cpu_kernels

    library = Path(_cpu_kernels.__spec__.origin)
    assert library.parent == PACKAGE / "backends"
    for path in (library, library.parent, PACKAGE):
        assert not path.stat().st_mode & stat.S_IWOTH, path


@pytest.mark.slow
def test_a_file_of_the_kernels_name_in_the_working_directory_is_not_loaded(tmp_path):
    trap = "raise SystemExit('loaded from the working directory')"
    for name in ("_cpu_kernels.py", "cpu.py", "layout.py"):
        (tmp_path / name).write_text(trap)
    script = "import torch, hf_swiglu; x = torch.ones(2, 20_000); hf_swiglu.swiglu(x, x)"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300, env=environment)
