"""Gradients are written over gate and up where the graph alone holds them, and nowhere else."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.models import hidden_states
from test_memory import llama, phi3
from torch.autograd.graph import saved_tensors_hooks

from hf_swiglu import backends, patch_model
from hf_swiglu.commands.peak_memory import peak_bytes

needs_kernel = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


def _mlp(build, **setting):
    torch.manual_seed(0)
    mlp = {"llama": llama, "phi3": phi3}[build]()
    return copy.deepcopy(mlp), mlp, patch_model(mlp, **setting)


@needs_kernel
@pytest.mark.parametrize("build", ["llama", "phi3"])
def test_gradients_are_written_over_what_was_saved(build):
    _, mlp, _ = _mlp(build)
    # A counter of launches would hold the tensors.
    seen = []
    kernel = backends.cpu_kernels().swiglu_bwd

    def recording(grad, *operands):
        seen.append([operand.data_ptr() for operand in operands[:4]])
        kernel(grad, *operands)

    with mock.patch.object(backends.cpu_kernels(), "swiglu_bwd", recording):
        mlp(hidden_states()).sum().backward()
    ((gate, up, grad_gate, grad_up),) = seen
    assert (grad_gate, grad_up) == (gate, up)


@needs_kernel
@pytest.mark.parametrize("keep", [3, 2])
def test_the_peak_of_one_mlp(keep):
    mlp = llama(32, 8192)
    patch_model(mlp, keep=keep)
    x = torch.randn(2048, 32)
    run = lambda: mlp(x).sum().backward()  # noqa: E731
    run()
    assert peak_bytes(run, torch.device("cpu")) / (2048 * 8192 * 4) <= 4.1


KEEPS = {
    "output": lambda out: out,
    "detach": lambda out: out.detach(),
    "numpy": lambda out: out.detach().numpy(),
    "slice": lambda out: out[:1],
    "storage": lambda out: out.untyped_storage(),
}


@needs_kernel
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("keep", KEEPS)
def test_what_a_hook_keeps_of_gate_or_up_outlives_backward(keep, projection):
    mlp, fused, _ = _mlp("llama")
    gradients = []
    for module in (mlp, fused):
        kept = []
        module.get_submodule(projection).register_forward_hook(
            lambda module, args, out, kept=kept: kept.append((KEEPS[keep](out), out.detach().clone()))
        )
        x = hidden_states().requires_grad_()
        module(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
        ((held, expected),) = kept
        if keep == "storage":
            held = torch.empty(0).set_(held, 0, expected.shape)
        assert torch.equal(torch.as_tensor(held), expected[: len(held)])
    torch.testing.assert_close(*gradients)


@needs_kernel
def test_what_saved_tensor_hooks_keep_outlives_backward():
    _, fused, _ = _mlp("llama")
    kept = {}

    def pack(tensor):
        kept[len(kept)] = tensor, tensor.detach().clone()
        return len(kept) - 1

    with saved_tensors_hooks(pack, lambda key: kept[key][0]):
        out = fused(hidden_states())
    out.square().sum().backward()
    assert kept and all(torch.equal(tensor, before) for tensor, before in kept.values())


@needs_kernel
@pytest.mark.parametrize("build", ["llama", "phi3"])
@pytest.mark.parametrize("keep", [3, 2])
def test_a_second_backward_is_right_or_raises(keep, build):
    mlp, fused, _ = _mlp(build, keep=keep)
    expected = torch.autograd.grad(mlp(hidden_states()).square().sum(), list(mlp.parameters()))
    loss = fused(hidden_states()).square().sum()
    for retain in (True, True, False):
        gradients = torch.autograd.grad(loss, list(fused.parameters()), retain_graph=retain)
        torch.testing.assert_close(gradients, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@needs_kernel
def test_the_same_tensor_as_gate_and_up_and_halves_of_one():
    from hf_swiglu import swiglu

    for cut in (lambda both: (both, both), lambda both: both.chunk(2, dim=0)):
        results = []
        for function in (swiglu, lambda gate, up: F.silu(gate) * up):
            x = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
            function(*cut(x * 1)).square().sum().backward()
            results.append(x.grad)
        torch.testing.assert_close(*results)


@needs_kernel
def test_after_an_error_in_between_another_backward_raises():
    """The gradients are written, and then the node fails before the graph lets go of what it had saved."""
    from hf_swiglu import swiglu

    x = hidden_states().requires_grad_()
    out = swiglu(torch.cat([x * 1] * 4), torch.cat([x * 2] * 4))

    def failing(*gradients):
        raise KeyError("once")

    handle = out.grad_fn.register_hook(failing)
    with pytest.raises(KeyError):
        out.backward(torch.ones_like(out))
    handle.remove()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))
