"""Each private name of `_compat`, deleted in turn: the import succeeds, and a patched model computes the same."""

import subprocess
import sys

import pytest

NAMES = [
    "torch._C._storage_Use_Count",
    "torch.Tensor._use_count",
    "torch._C._len_torch_function_stack",
    "torch._C._get_function_stack_at",
    "torch.utils._device.DeviceContext",
    "torch._C._len_torch_dispatch_stack",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._autograd._saved_tensors_hooks_is_enabled",
    "torch._C._autograd._pop_saved_tensors_default_hooks",
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._current_graph_task_id",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.autograd.graph.increment_version",
]

# The name is hidden from `_compat` alone: PyTorch itself, and other modules of ours, need some of them.
SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import functools
reduce, name = functools.reduce, sys.argv[1]

def without(function, path, owner):
    path = list(path)
    return None if f"{getattr(owner, '__name__', '')}.{'.'.join(path)}" == name else reduce(function, path, owner)

functools.reduce = without
import hf_swiglu
functools.reduce = reduce

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
model, ids = LlamaForCausalLM(config), torch.randint(0, 64, (2, 40))

def run():
    model.zero_grad()
    with torch.no_grad():
        scored = model(ids).logits
    output = model(ids, labels=ids)
    output.loss.backward()
    return [scored, output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

expected = run()
hf_swiglu.patch_model(model)
torch.testing.assert_close(run(), expected)
from hf_swiglu import _compat
print(sum(value is None for key, value in vars(_compat).items() if not key.startswith("__")))
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_costs_no_more_than_a_fast_path(name):
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1, "the name was hidden"
