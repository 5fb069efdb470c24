"""Compares output and gradients of one small instance of a class before and after fusion."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_swiglu import backends, patch_model
from hf_swiglu.testing import FLOOR, RATIO, counted_launches, kernels_at_every_size
from tools.model_support.meta_instances import Instance

# Sizes are halved until they are no larger, then rounded down to multiples of 16, as grouped_mm requires.
_LARGEST, _MULTIPLE = 64, 16
_TOKENS, _EXPERTS, _TOP_K = 128, 4, 2
# Standard deviation of the inputs: some values, not most, exceed the limits of the clamped variants, 7 and 10.
_SPREAD = 4.0

# transformers' defaults to the last, which PyTorch computes on a CPU since 2.9 only.
RUNS_GROUPED_MM = torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU")
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm") if RUNS_GROUPED_MM else ("eager", "batched_mm")


class NoComparison(Exception):
    """No small instance of the class can be built or run; the message says why."""


def why_different(instance: Instance) -> str | None:
    """How the class's fused outputs or gradients differ from eager's by more than the tolerance; None if they do not.

    The error against float64 may be 1.5 times that of eager PyTorch in the same dtype, + 1e-6.

    Raises:
        NoComparison: no small instance can be built or run.
    """
    module = _small_instance(instance)
    _choose(module, "eager")
    inputs = _inputs(module)
    exact = _run(copy.deepcopy(module).double(), [x.double() if x.is_floating_point() else x for x in inputs])
    fused_module = copy.deepcopy(module)
    if not patch_model(fused_module, strict=False).fused:
        return "its small instance is not fused"
    for implementation in _implementations(module):
        _choose(module, implementation)
        _choose(fused_module, implementation)
        eager = _run(module, inputs)
        with kernels_at_every_size(), counted_launches() as launches:
            fused = _run(fused_module, inputs)
        if not launches and backends.unavailable("cpu") is None:
            return f"no kernel ran under {implementation}"
        difference = _why_worse(fused, eager, exact)
        if difference is not None:
            return f"{difference} under {implementation}"
    return None


def _why_worse(fused: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> str | None:
    """Compares one error for all outputs and gradients of the module: the norm of their relative errors.

    Not one tensor at a time: the gradient of a scalar, a scale of the output, has over 1.5 times eager's error with 24
    of 100 seeds, and less than 1 / 1.5 of it with 24 (float32, Inkling's MLP).
    """
    names = [name for name, tensor in exact.items() if tensor.count_nonzero()]

    def relative(results: dict[str, Tensor]) -> Tensor:
        return torch.stack([(results[name].double() - exact[name]).norm() / exact[name].norm() for name in names])

    ours, plain = relative(fused), relative(eager)
    allowed = RATIO * plain.norm().item() + FLOOR
    if ours.norm().item() <= allowed:
        return None
    worst = names[int((ours - plain).argmax())]
    return f"{worst}: error {ours.norm():.1e} with all other tensors, against float64, {allowed:.1e} allowed"


def _small_instance(instance: Instance) -> nn.Module:
    cls = type(instance.module)
    arguments = {name: _small(name, value) for name, value in _bound(cls, instance).items()}
    try:
        module = cls(**arguments)
    except Exception as error:
        raise NoComparison(f"its small instance cannot be built: {error!r}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                fan_in = max(parameter.shape[-2:])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return module.eval()


def _bound(cls: type[nn.Module], instance: Instance) -> dict[str, object]:
    bound = inspect.signature(cls.__init__).bind(None, *instance.args, **instance.kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    return {**arguments, **arguments.pop("kwargs", {})}


def _small(name: str, value: object) -> object:
    if isinstance(value, PretrainedConfig):
        config = copy.deepcopy(value)
        for field, inner in list(vars(config).items()):
            vars(config)[field] = _small(field, inner)
        return config
    if type(value) is not int:
        return value
    if re.fullmatch(r"(moe_)?(num|n)_(local_|routed_)?experts", name):
        return _EXPERTS
    if re.fullmatch(r"(num_)?experts_per_tok(en)?", name):
        return min(value, _TOP_K)
    if value == 0 and name.endswith("intermediate_size"):
        # A default that omits this part of the model.
        return _LARGEST
    small = value
    while small > _LARGEST:
        small //= 2
    return value if small == value else small - small % _MULTIPLE


def _inputs(module: nn.Module) -> list[Tensor]:
    """Inputs that the module's forward accepts, found by trying possible widths and ranks."""
    errors = []
    for width in dict.fromkeys(_widths(module)):
        for shape in (
            (_TOKENS, width),
            # A square number of tokens, for modules that take them as an image.
            (2, _TOKENS // 2, width),
            (4, width, _TOKENS // 4),
            (1, 4, _TOKENS // 4, width),
            # For modules that multiply their input by weights given as another input.
            (width, width),
        ):
            inputs = _arguments(module, shape)
            try:
                _run(module, inputs)
            except Exception as error:
                errors.append(error)
            else:
                return inputs
    raise NoComparison(f"no input of {len(errors)} tried ran: {errors[0] if errors else 'it has no width'!r}")


def _widths(module: nn.Module) -> Iterator[int]:
    for child in module.children():
        width = getattr(child, "in_features", None) or getattr(child, "in_channels", None)
        width = width or getattr(child, "normalized_shape", (None,))[0]
        if isinstance(width, int):
            yield width
    for name in ("hidden_size", "hidden_dim", "input_size", "ffn_hidden_size"):
        if isinstance(getattr(module, name, None), int):
            yield getattr(module, name)
    yield from (parameter.shape[-1] for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
    if hasattr(module, "config"):
        yield from (part.hidden_size for part in vars(module.config).values() if hasattr(part, "hidden_size"))


def _arguments(module: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for parameter in list(inspect.signature(module.forward).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if re.search(r"ind(ex|ices)|selected|top_?k(?!_?weight)", parameter.name):
            # Every expert gets tokens.
            inputs.append((torch.arange(_TOKENS * _TOP_K) % _EXPERTS).view(_TOKENS, _TOP_K))
        elif re.search(r"weights|scores|probs|gammas", parameter.name):
            inputs.append(torch.rand(_TOKENS, _TOP_K, generator=generator) + 0.1)
        elif parameter.default is parameter.empty:
            inputs.append(torch.randn(shape, generator=generator) * _SPREAD)
    return inputs


def _run(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    module.zero_grad()
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = module(*leaves)
    output = output[0] if isinstance(output, tuple) else output
    # A different weight for each element, scaled so that gradients are of the order of one.
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape) / _TOKENS**0.5
    (output * weights).sum().backward()
    gradients = {f"the gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    named = {f"the gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"the output": output.detach(), **gradients, **named}


def _implementations(module: nn.Module) -> tuple[str, ...]:
    # The decorator that dispatches between the implementations sets `is_transposed`.
    return EXPERTS_IMPLEMENTATIONS if hasattr(module, "is_transposed") else ("eager",)


def _choose(module: nn.Module, implementation: str) -> None:
    if hasattr(module, "config"):
        module.config._experts_implementation = implementation
