"""User-defined hooks run once a call, as unpatched: what they are on is not computed again in backward."""

import pytest
from test_keep import built, llama, run_and_differentiate
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

every_setting = pytest.mark.parametrize("setting", [{"keep": 2}, {"keep": 1}, {"keep": 0}, {"tile": 16}], ids=str)


@every_setting
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_hooks_on_a_projection_run_as_often_as_unpatched(projection, setting):
    def calls(mlp):
        child, seen = getattr(mlp, projection), []
        handles = [
            child.register_forward_pre_hook(lambda module, args: seen.append("before forward")),
            child.register_forward_hook(lambda module, args, out: seen.append("forward")),
            child.register_full_backward_pre_hook(lambda module, out: seen.append("before backward")),
            child.register_full_backward_hook(lambda module, into, out: seen.append("backward")),
        ]
        for kept in range(len(handles)):
            run_and_differentiate(mlp)
            handles[kept].remove()
        return seen

    mlp, _ = built(llama, **setting)
    assert calls(mlp) == calls(llama())


@every_setting
def test_a_hook_of_all_modules_runs_as_often_as_unpatched(setting):
    def calls(mlp):
        seen = []
        handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
        try:
            run_and_differentiate(mlp)
        finally:
            handle.remove()
        return seen.count(nn.Linear)

    mlp, _ = built(llama, **setting)
    assert calls(mlp) == calls(llama()) == 3
