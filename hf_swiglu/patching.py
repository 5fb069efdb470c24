"""Fusing a loaded model's MLPs, and undoing it: all of it or nothing, and never silently."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Sequence

from torch import nn

from hf_swiglu import swapping, verification
from hf_swiglu.fusion import FusedModule, fused_class, original_class
from hf_swiglu.recognition import NotFusable, Product
from hf_swiglu.report import ALREADY_FUSED, FUSED, SKIPPED, Entry, PatchReport
from hf_swiglu.survey import Found, choose, survey
from hf_swiglu.waiting import waiting_members


def patch_model(
    model: nn.Module,
    *,
    activation: str | None = None,
    recompute: bool = True,
    strict: bool = True,
    verify: bool = False,
    only: str | Sequence[str] | None = None,
) -> PatchReport:
    """Fuse every MLP of `model` whose forward multiplies an activated gate by another projection.

        down(act(gate(x)) * up(x))      becomes      down(product(gate(x), up(x)))

    in place, with the same parameters, outputs and state_dict, whatever the module and its children are called.
    Without gradients the product overwrites gate. With them, gate and up are all that is kept for backward, where a
    kernel runs: see `available_backends`; gates of up to 12,288 elements on a CPU go without.

    Args:
        model: any `torch.nn.Module`; wrapped by PEFT, accelerate or DDP is fine.
        activation: "swiglu" or "silu" swaps the gates' activation first, in the modules and in the config. This
            changes the model's function. None, the default, keeps it.
        recompute: keep gate and up for backward, and compute the product again when the down projection's gradient
            needs it. False keeps the product as well: half a buffer's worth of arithmetic for a buffer of memory.
        strict: raise when there is nothing to fuse.
        verify: run each distinct class on a random input before and after, and compare.
        only: shell-style patterns of class names or of qualified names, such as "LlamaMLP" or "model.layers.0.*".

    Returns:
        What was fused and what was skipped, with the reasons.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing to fuse (with `strict`), a pattern that matches nothing, an unknown activation, or a swap
            that the config cannot express. The model is then as it was.
        RuntimeError: `verify` found a difference. The model is then as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_swiglu import patch_model
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> print(patch_model(LlamaForCausalLM(config)))
        gated MLPs: 2 fused, 0 already fused, 0 skipped
          fused: 2 x LlamaMLP (model.layers.0.mlp ... model.layers.1.mlp): separate gate and up, SiLUActivation
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model: model must be a torch.nn.Module; got {type(model).__name__}")
    chosen = choose(model, only)
    surveyed = survey(chosen)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as undo:
        if activation is not None:
            stack.enter_context(swapping.swapped(model, surveyed, activation))
            surveyed = survey(chosen)
        report = PatchReport([_entry(*row) for row in surveyed])
        if strict and not report.fused and not report.already_fused:
            raise ValueError(_nothing_fused(model, report))
        names = {entry.name for entry in report.fused}
        plan = [
            (module, fused(type(module), found, recompute), found)
            for name, module, found in surveyed
            if name in names and not isinstance(found, NotFusable)
        ]
        if verify:
            verification.compare(plan, set_class)
        for module, cls, _ in plan:
            undo.callback(set_class, module, type(module))
            set_class(module, cls)
        undo.pop_all()
    return report


def unpatch_model(model: nn.Module) -> int:
    """Undo `patch_model`: classes, swapped activations and config are what they were before.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: a fused module was wrapped in another class since (FSDP does that); nothing was changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_swiglu import patch_model, unpatch_model
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(config)
        >>> _ = patch_model(model)
        >>> unpatch_model(model)
        2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch_model: model must be a torch.nn.Module; got {type(model).__name__}")
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedModule)]
    for name, module in modules:
        if FusedModule not in type(module).__bases__:
            raise RuntimeError(
                f"unpatch_model: {name} was wrapped as {type(module).__mro__[1].__name__} after it was fused; "
                "unpatch a model before wrapping it"
            )
    for _, module in modules:
        set_class(module, original_class(type(module)))
    return len({module for _, module in modules} | set(swapping.restore(model)))


def fused(original: type[nn.Module], found: Product, recompute: bool = True) -> type[nn.Module]:
    """The fused subclass of the class of a module in which `found` was recognised."""
    return fused_class(original, found, recompute, waiting_members(original, found))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class, and the bound forward that accelerate's hooks keep on the instance."""
    for name in _bound_forwards(module):
        vars(module)[name] = types.MethodType(cls.forward, module)
    module.__class__ = cls


def _bound_forwards(module: nn.Module) -> list[str]:
    """The instance attributes that hold the class's own forward: `_old_forward` while accelerate's hook is on,
    `forward` after it was taken off."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]


def _entry(name: str, module: nn.Module, found: Found) -> Entry:
    class_name = type(module).__name__
    if isinstance(found, NotFusable):
        return Entry(name, class_name, SKIPPED, reason=str(found))
    described = (found.kind, found.activation)
    if isinstance(module, FusedModule):
        return Entry(name, class_name, ALREADY_FUSED, *described)
    if found.gating is None:
        reason = f"its gate's activation is {found.activation}, not SiLU or SwiGLU"
        return Entry(name, class_name, SKIPPED, *described, reason)
    if {"forward", "_old_forward"} & vars(module).keys() and not _bound_forwards(module):
        reason = "its forward was replaced on the instance, by something other than accelerate's hooks"
        return Entry(name, class_name, SKIPPED, *described, reason)
    return Entry(name, class_name, FUSED, *described)


def _nothing_fused(model: nn.Module, report: PatchReport) -> str:
    detail = f"\n{report}\n" if report else " no module multiplies an activated projection by another. "
    return f"patch_model: nothing to fuse in {type(model).__name__}:{detail}Pass strict=False to accept that"
