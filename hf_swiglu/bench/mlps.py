"""A whole LLaMA MLP, eager and fused, with the same weights: inference and a training step, time and peak memory."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_swiglu import patch_model
from hf_swiglu.bench.kernels import DTYPES, WrongResult
from hf_swiglu.bench.rows import Case, Row
from hf_swiglu.bench.timing import take_turns
from hf_swiglu.measuring import peak_bytes
from hf_swiglu.tolerance import why_worse

# hidden_size, intermediate_size.
SIZES = {"SmolLM2-135M": (576, 1536), "Llama-3-8B": (4096, 14336)}
CPU_TOKENS, DEVICE_TOKENS = (1, 512, 4096), (1, 64, 2048, 16384)

# Enough tokens for the kernels, and few enough for float64.
_CHECKED_TOKENS = 64


def measure(device: torch.device, seconds: float, compiled: bool) -> Iterator[Row]:
    """Both MLPs in float32 and bfloat16."""
    for name, (hidden, intermediate) in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            with torch.device(device):
                eager = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate)).to(DTYPES[dtype])
            modules = contenders(eager, compiled)
            _check(modules, _input(eager, _CHECKED_TOKENS))
            for tokens in CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS:
                x = _input(eager, tokens)
                for what, step in (("inference", _inference), ("training", _training)):
                    if (what == "training" and tokens == 1) or _takes_minutes(eager, what, tokens):
                        continue
                    functions = {label: step(module, x) for label, module in modules.items()}
                    peaks = {label: peak_bytes(functions[label], device) for label in ("eager", "ours")}
                    times = take_turns(functions, seconds, device)
                    yield Row(Case("mlp", what, dtype, f"{name}, {tokens} tokens"), times, peak_bytes=peaks)


def contenders(eager: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """The module itself, and others with the same parameters."""
    ours = shared_copy(eager)
    patch_model(ours)
    modules = {"eager": eager, "ours": ours}
    if compiled:
        modules["compile"] = torch.compile(shared_copy(eager), dynamic=False)  # type: ignore[assignment]
    if next(eager.parameters()).is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

        modules["liger"] = LigerSwiGLUMLP(eager.config)
        for name, parameter in eager.named_parameters():
            owner, _, attribute = name.rpartition(".")
            setattr(modules["liger"].get_submodule(owner), attribute, parameter)
    return modules


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of all but the parameters, which both have from then on."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _takes_minutes(module: nn.Module, what: str, tokens: int) -> bool:
    # A processor without bfloat16 products computes 20 GFLOP/s of them forward and 3 backward, and 120 of float32's
    # (2 cores of an EPYC 7003).
    weight = next(module.parameters())
    forward, backward = (2e10, 3e9) if weight.dtype == torch.bfloat16 else (1.2e11, 1.2e11)
    operations = 6 * weight.numel() * tokens
    seconds = operations / forward + (2 * operations / backward if what == "training" else 0)
    return weight.device.type == "cpu" and seconds > 15


def _input(module: nn.Module, tokens: int) -> Tensor:
    weight = next(module.parameters())
    return torch.randn(1, tokens, weight.shape[1], device=weight.device).to(weight.dtype)


def _inference(module: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def step() -> Tensor:
        return module(x)

    return step


def _training(module: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.detach().requires_grad_()
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(module(x), (x, *module.parameters()), grad)


def _check(modules: dict[str, nn.Module], x: Tensor) -> None:
    exact_module = copy.deepcopy(modules["eager"]).double()
    run = functools.partial(_outputs, grad=torch.randn_like(x))
    eager, exact = run(modules["eager"], x), run(exact_module, x.double())
    for label, module in modules.items():
        for result, plain, expected in zip(run(module, x), eager, exact, strict=True):
            reason = why_worse(result, plain, expected)
            if reason is not None:
                raise WrongResult(f"{label}: {reason}")


def _outputs(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = module(x)
    x = x.detach().requires_grad_()
    return [out, *torch.autograd.grad(module(x), (x, *module.parameters()), grad.to(x.dtype))]
