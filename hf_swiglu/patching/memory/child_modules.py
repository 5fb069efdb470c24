"""Properties of the modules that a gated MLP calls: are rows independent, calls repeatable, weights gathered?"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hf_swiglu.patching.activations import ACTIVATION_CLASSES, defining_module, has_no_hooks
from hf_swiglu.patching.memory.recompute import is_from_trusted_library

_ELEMENTWISE = (ACTIVATION_CLASSES - {nn.PReLU}) | {
    nn.SiLU, nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Sigmoid, nn.Tanh, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid, nn.Identity, nn.Dropout,
}  # fmt: skip
_NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name))
# Integer weights, dequantised at every call. bitsandbytes' Linear8bitLt reads whole columns of its input.
_QUANTISED = {("bitsandbytes.nn.modules", "Linear4bit")}
_ADAPTED = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}
# Their hooks move or gather weights. PEFT's may pass one adapter's name for each sequence.
_HARMLESS_HOOKS = ("accelerate.", "torch.distributed.", "deepspeed.")


def not_rowwise(child: nn.Module) -> str | None:
    """Why a row of `child`'s output may depend on several rows of its input; "" where `child` acts on the last
    dimension alone, and None where its class is unknown."""
    cls = type(child)
    if not is_from_trusted_library(cls.forward) or not is_from_trusted_library(cls.__call__):
        return None
    name = (cls.__module__, cls.__name__)
    if cls in _ELEMENTWISE:
        return ""
    if cls in _NORMS:
        return "" if len(child.normalized_shape) == 1 else f"its {cls.__name__} normalises more than the last dimension"  # type: ignore[arg-type]
    if cls is nn.Linear:
        return "" if is_ordinary_weight(child.weight) else f"a weight of it is a {type(child.weight).__name__}"
    if name in _QUANTISED:
        return ""
    return _adapters(child) if name in _ADAPTED else None


def user_hooks(child: nn.Module) -> str:
    """Which module in `child`, itself included, has user-defined hooks, which may count their calls; "" if none."""
    for each in child.modules():
        hook = vars(each).get("_hf_hook")
        wrapped = [inner for inner in (hook, *getattr(hook, "hooks", ())) if inner is not None]
        if not has_no_hooks(vars(each), is_from_trusted_library) or not all(
            is_from_trusted_library(type(inner)) for inner in wrapped
        ):
            return f"a {type(each).__name__} in it has user-defined hooks"
    return ""


def hooks_over_rows(child: nn.Module) -> str:
    """Which module in `child`, itself included, has hooks that do more than move or gather weights; "" if none."""
    for each in child.modules():
        if not has_no_hooks(vars(each), _is_harmless):
            return f"a {type(each).__name__} in it has hooks"
    return ""


def has_trusted_forward(child: nn.Module) -> bool:
    """Whether no user-defined forward on an instance replaces the class's, in `child` and in the modules in it."""
    return all(is_from_trusted_library(vars(each).get("forward", nn.Module.__call__)) for each in child.modules())


def _adapters(child: nn.Module) -> str:
    if getattr(child, "lora_variant", None):
        return "an adapter is a variant of LoRA"
    for name, inner in child.named_modules():
        if inner is not child and not isinstance(inner, (nn.ModuleDict, nn.ParameterDict)):
            reason = not_rowwise(inner)
            if reason is None:
                return f"{name} is a {type(inner).__name__}"
            if reason:
                return reason
    return ""


def is_ordinary_weight(weight: object) -> bool:
    """Whether a weight is a plain tensor, or one that is sharded by rows or columns; a quantised one may make the
    result depend on all rows of the input."""
    return type(weight) in (Tensor, nn.Parameter) or type(weight).__name__ == "DTensor"


def updates_buffers(child: nn.Module) -> bool:
    """Whether a call in training may update buffers in `child`: the vectors of a spectral norm, an observer's range.
    Other libraries' quantised weights are constant buffers."""
    return any(each._buffers and type(each).__module__.startswith("torch.") for each in child.modules())


def may_run_again(child: nn.Module) -> bool:
    """Whether a second call of `child` computes the same without side effects, judged by the classes in it."""
    return all(
        is_from_trusted_library(type(each).forward)
        and not getattr(each, "track_running_stats", False)
        and not getattr(each, "inplace", False)
        for each in child.modules()
    )


def communicates(module: nn.Module) -> bool:
    """Whether calls of the modules below gather weights from other processes: FSDP and ZeRO-3 below this module."""
    return any(map(_gathers, (child for child in module.modules() if child is not module)))


def _gathers(child: nn.Module) -> bool:
    if any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(child).__mro__):
        return True
    return not has_no_hooks(vars(child), lambda hook: not defining_module(hook).startswith("deepspeed."))


def _is_harmless(hook: Callable) -> bool:
    return defining_module(hook).startswith(_HARMLESS_HOOKS)
