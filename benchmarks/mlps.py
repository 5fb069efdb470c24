"""Level "mlp": a LLaMA MLP, eager and fused with the same weights: time and memory, with and without gradients."""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.contenders import DTYPES, WrongResult, compiled
from benchmarks.result_rows import Case, Row
from hf_swiglu import patch_model
from hf_swiglu.commands.models import copy_sharing_parameters
from hf_swiglu.commands.peak_memory import peak_bytes
from hf_swiglu.commands.timing import seconds_per_call, take_turns
from hf_swiglu.testing import why_not_close

# hidden_size, intermediate_size.
SIZES = {"SmolLM2-135M": (576, 1536), "Llama-3-8B": (4096, 14336)}
CPU_TOKENS, DEVICE_TOKENS = (1, 512, 4096), (1, 64, 2048, 16384)

Step = Callable[[nn.Module, Tensor], Callable[[], object]]

# Enough tokens for the kernels, and few enough for float64.
_CHECKED_TOKENS = 64
# A call that takes longer, in seconds, is left out; estimated with an eighth of its tokens.
_LONGEST_CALL, _ESTIMATED_FROM = 15, 8


def measure(device: torch.device, seconds: float, compile: bool) -> Iterator[Row]:
    """Both MLPs in float32 and bfloat16."""
    for name, (hidden, intermediate) in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            with torch.device(device):
                eager = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate)).to(DTYPES[dtype])
            modules = contenders(eager, compile)
            _check(modules, _input(eager, _CHECKED_TOKENS))
            for tokens in CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS:
                x = _input(eager, tokens)
                for what, step in (("inference", _inference), ("training", _training)):
                    if (what == "training" and tokens == 1) or _takes_minutes(step, eager, tokens):
                        continue
                    functions = {label: step(module, x) for label, module in modules.items()}
                    peaks = {label: peak_bytes(functions[label], device) for label in ("eager", "ours")}
                    times = take_turns(functions, seconds, device)
                    yield Row(Case("mlp", what, dtype, f"{name}, {tokens} tokens"), times, peak_bytes=peaks)


def contenders(eager: nn.Module, compile: bool) -> dict[str, nn.Module]:
    """The module itself, and contenders with the same parameters."""
    ours = copy_sharing_parameters(eager)
    patch_model(ours)
    modules = {"eager": eager, "ours": ours}
    if compile:
        modules["compile"] = compiled(copy_sharing_parameters(eager))
    if next(eager.parameters()).is_cuda:
        modules |= rivals(eager)
    return modules


def rivals(eager: nn.Module) -> dict[str, nn.Module]:
    """The MLPs of other packages that are installed and take the dtype, with eager's parameters."""
    modules: dict[str, nn.Module] = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

        modules["liger"] = LigerSwiGLUMLP(eager.config)
    if importlib.util.find_spec("flash_swiglu_mlp") and next(eager.parameters()).dtype != torch.float32:
        from flash_swiglu_mlp import FlashSwiGLUMLP

        modules["flash-swiglu-mlp"] = FlashSwiGLUMLP(eager.hidden_size, eager.intermediate_size)
    for module in modules.values():
        for name, parameter in eager.named_parameters():
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
    return modules


def _takes_minutes(step: Step, module: nn.Module, tokens: int) -> bool:
    """Whether a call would take longer than a benchmark can wait, estimated from one with an eighth of the tokens.

    Some processors multiply bfloat16 30 times slower than float32.
    """
    weight = next(module.parameters())
    if weight.device.type != "cpu" or tokens < _ESTIMATED_FROM:
        return False
    part = seconds_per_call(step(module, _input(module, tokens // _ESTIMATED_FROM)), weight.device)
    return _ESTIMATED_FROM * part > _LONGEST_CALL


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
    """Raise if the fused module's results are wrong; remove other contenders with wrong results."""
    exact_module = copy.deepcopy(modules["eager"]).double()
    run = functools.partial(_outputs, grad=torch.randn_like(x))
    eager, exact = run(modules["eager"], x), run(exact_module, x.double())
    for label in list(modules):
        reasons = [why_not_close(*results) for results in zip(run(modules[label], x), eager, exact, strict=True)]
        fault = next((f"{label}: {reason}" for reason in reasons if reason is not None), None)
        if fault is not None and label == "ours":
            raise WrongResult(fault)
        if fault is not None:
            del modules[label]
            warnings.warn(f"not timed, because its results are wrong: {fault}", stacklevel=2)


def _outputs(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = module(x)
    x = x.detach().requires_grad_()
    return [out, *torch.autograd.grad(module(x), (x, *module.parameters()), grad.to(x.dtype))]
