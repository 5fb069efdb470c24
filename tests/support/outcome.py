"""What a call shows of itself: its outputs, and the gradients of everything that requires one, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_swiglu.testing import assert_close


def outcome(
    call: Callable,
    *inputs: Tensor,
    of: nn.Module | None = None,
    differentiated: bool = True,
    train_inputs: bool = True,
    grad_out: Tensor | None = None,
    wrt: Sequence[Tensor] | None = None,
    **keywords: object,
) -> dict[str, Tensor]:
    """The outputs of `call(*inputs, **keywords)`, and the gradients that follow from them.

    Random numbers are the same at every call. Gradients are those of the inputs, unless `train_inputs` is off, and of
    the parameters of `of`, which is `call` where that is a module; or of `wrt` alone. They start from the output's
    `loss` if it has one, else from `grad_out` for the first output, else from fixed weights for every output.
    """
    torch.manual_seed(0)
    if of is None and isinstance(call, nn.Module):
        of = call
    leaves = [x.detach().requires_grad_(differentiated and train_inputs and x.is_floating_point()) for x in inputs]
    with contextlib.nullcontext() if differentiated else torch.no_grad():
        outputs = _named(call(*leaves, **keywords))
    shown = {name: output.detach() for name, output in outputs.items()}
    roots = [outputs["loss"]] if "loss" in outputs else [output for output in outputs.values() if output.requires_grad]
    if not differentiated or not roots:
        return shown
    first = None if "loss" in outputs else [grad_out if grad_out is not None else _weights(roots[0])]
    weights = first and [*first, *map(_weights, roots[1:])]
    if wrt is not None:
        gradients = torch.autograd.grad(roots, wrt, weights)
        return shown | {f"gradient {at}": gradient for at, gradient in enumerate(gradients)}
    if of is not None:
        of.zero_grad()
    # Not `torch.autograd.grad`: reentrant checkpointing refuses it, and the hooks of DDP and FSDP do not see it.
    torch.autograd.backward(roots, weights)
    trained = {f"gradient of input {at}": leaf for at, leaf in enumerate(leaves)}
    # Looked up afterwards: FSDP makes other parameters in the first call. DDP names its module "module".
    for name, parameter in of.named_parameters() if of is not None else ():
        trained[f"gradient of {name.removeprefix('module.')}"] = parameter
    return shown | {name: _whole(tensor.grad) for name, tensor in trained.items() if tensor.grad is not None}


def assert_as_eager(
    function: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Tensor, grad_out: Tensor | None = None
) -> None:
    """Hold outputs and gradients of `function` to the tolerance, given the same in plain PyTorch."""
    exact = outcome(eager, *(x.double() for x in inputs), grad_out=None if grad_out is None else grad_out.double())
    assert_close(outcome(function, *inputs, grad_out=grad_out), outcome(eager, *inputs, grad_out=grad_out), exact)


def _named(result: object) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, tuple):
        return {f"output {at}": part for at, part in enumerate(result) if part is not None}
    return {name: value for name, value in result.items() if name in ("loss", "logits")}


def _weights(output: Tensor) -> Tensor:
    """Eighths from 1/8 to 1 of either sign, another for each element, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(7)
    magnitudes = torch.randint(1, 9, output.shape, generator=generator) / 8
    signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
    return (magnitudes * signs).to(output.device, output.dtype)


def _whole(gradient: Tensor) -> Tensor:
    """The gradient itself; of a sharded parameter, all shards of it."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
