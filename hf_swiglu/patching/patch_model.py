"""`patch_model` and `unpatch_model`: fusing a loaded model's MLPs, or an error that says why none can be fused.

After an error or an interrupt the model is unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_swiglu import _compat
from hf_swiglu.patching import activation_swap
from hf_swiglu.patching.changes import Changes
from hf_swiglu.patching.memory.planning import effective_setting
from hf_swiglu.patching.memory.settings import DEFAULT_KEEP, Memory, checked
from hf_swiglu.patching.recognition.gated_mlps import Found
from hf_swiglu.patching.recognition.method_source import NoSource
from hf_swiglu.patching.report import ALREADY_FUSED, FUSED, MEMORY_ONLY, SKIPPED, Entry, PatchReport, Verdict
from hf_swiglu.patching.rewriting import fused_classes
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.patching.survey import choose, survey
from hf_swiglu.patching.verify import compare


@dataclass(frozen=True)
class _Planned:
    """The plan for one module: `fused` is its new class, None where it keeps its class."""

    entry: Entry
    module: nn.Module
    found: Found
    fused: type[nn.Module] | None = None


def patch_model(
    model: nn.Module,
    *,
    activation: str | None = None,
    keep: int | None = None,
    tile: int | None = None,
    strict: bool = True,
    verify: bool = False,
    only: str | Sequence[str] | None = None,
) -> PatchReport:
    """Fuse every MLP of `model` whose forward multiplies an activated gate by another projection.

        down(act(gate(x)) * up(x))      becomes      down(product(gate(x), up(x)))

    in place, with the same parameters, outputs and state_dict, for any names of the module and its children. Only the
    product is replaced: the rest of the method is the class's own Python, and whether to fuse is decided at every call,
    from the activation, gate and up of that call. Without gradients the product is written over gate. With gradients,
    only gate and up are kept for backward, where a kernel runs: see `available_backends`; no kernel runs for gates of
    up to 12,288 elements on a CPU.

    Args:
        model: any `torch.nn.Module`; wrapped by PEFT, accelerate or DDP is fine.
        activation: "swiglu" or "silu" swaps the gates' activation first, in the modules and in the config. This
            changes the model's function. None, the default, keeps it.
        keep: how many buffers of tokens x intermediate size each MLP keeps for backward. 3: gate, up and the product.
            2, the default: gate and up; the product is computed again. 1: gate; the projection of up runs again.
            0: neither; both projections run again. The down projection never runs again.
        tile: the largest number of rows (tokens) of gate and up that exist at a time, in inference and in training.
            `keep` is then 0, and may be omitted.
        strict: raise when there is nothing to fuse.
        verify: run each module on a random input before and after, and compare.
        only: shell-style patterns of class names or of qualified names, such as "LlamaMLP" or "model.layers.0.*".

    Returns:
        The fused and the skipped modules, with the reasons, and the `keep` and `tile` of each module. `keep` below 2
        and `tile` also apply to MLPs whose gate has another activation. A module that was fused with other options is
        fused again with these.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing to fuse (with `strict`), a pattern that matches nothing, an unknown activation, an invalid
            `keep` or `tile`, or a swap that the config cannot express. The model is then unchanged.
        RuntimeError: `verify` found a difference. The model is then unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_swiglu import patch_model
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> print(patch_model(LlamaForCausalLM(config)))
        gated MLPs: 2 fused, 0 already fused, 0 skipped
          fused: 2 x LlamaMLP: separate gate and up, SiLUActivation
            model.layers.0.mlp ... model.layers.1.mlp
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model: model must be a torch.nn.Module; got {type(model).__name__}")
    memory = checked(keep, tile)
    chosen = choose(model, only)
    changes = Changes()
    with changes, changes:
        is_swapped = activation is not None and activation_swap.swap(model, survey(chosen), activation, changes)
        plan = [_planned(name, module, found, memory) for name, module, found in survey(chosen)]
        report = PatchReport([planned.entry for planned in plan])
        if strict and not (report.fused or report.already_fused or report.memory_only):
            raise ValueError(_nothing_fused(model, report))
        pending = []
        for planned in plan:
            if planned.fused is not None:
                if verify:
                    compare(planned.module, planned.entry.name, type(planned.module), planned.fused, planned.found)
                pending += fused_classes.class_changes(planned.module, planned.fused)
        changes.make(pending)
    if activation is not None and is_swapped:
        activation_swap.warn_of_adapters(model, activation)
    return report


def unpatch_model(model: nn.Module) -> int:
    """Undo `patch_model`: restores classes, swapped activations and config.

    Returns:
        The number of modules restored.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: a fused module has since been wrapped in another class (FSDP does that); nothing was changed.

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
    # Each class is read once: another thread may unpatch the same model.
    classes = [(name, module, type(module)) for name, module in model.named_modules()]
    modules = [each for each in classes if issubclass(each[2], FusedModule)]
    for name, _, cls in modules:
        if fused_classes.wrapper_of(cls) is not None:
            raise RuntimeError(
                f"unpatch_model: {name} was wrapped as {cls.__name__} by "
                f"{fused_classes.wrapper_of(cls)} after it was fused; unpatch a model before wrapping it"
            )
    restored, pending = activation_swap.restoration(model)
    for _, module, cls in modules:
        pending += fused_classes.class_changes(module, fused_classes.original_class(cls))
    changes = Changes()
    with changes, changes:
        changes.make(pending)
    return len({module for _, module, _ in modules} | set(restored))


def _planned(name: str, module: nn.Module, found: Found, requested: Memory) -> _Planned:
    def skipped(reason: str) -> _Planned:
        entry = Entry(name, type(module).__name__, SKIPPED, found.kind, found.activation, reason)
        return _Planned(entry, module, found)

    def planned(verdict: Verdict, fused: type[nn.Module] | None) -> _Planned:
        entry = dataclasses.replace(
            skipped(found.reason).entry, verdict=verdict, keep=memory.keep, tile=memory.tile, note=note
        )
        return _Planned(entry, module, found, fused)

    choices = found.choices or (found.memory_only if requested.keep < DEFAULT_KEEP else ())
    if not choices:
        was_patched = isinstance(module, FusedModule) and fused_classes.wrapper_of(type(module)) is None
        return dataclasses.replace(
            skipped(found.reason), fused=fused_classes.original_class(type(module)) if was_patched else None
        )
    original = fused_classes.original_class(type(module)) if isinstance(module, FusedModule) else type(module)
    memory, note = effective_setting(requested, module, original, choices, found.kind)
    verdict = FUSED if found.choices else MEMORY_ONLY
    if verdict == MEMORY_ONLY and memory.keep >= DEFAULT_KEEP:
        return skipped(f"{found.reason}; {note}")
    if {"forward", _compat.ACCELERATE_FORWARD} & vars(module).keys() and not fused_classes.bound_forwards(module):
        return skipped("its forward was replaced on the instance, by something other than accelerate's hooks")
    if isinstance(module, FusedModule):
        if fused_classes.is_fused_with(type(module), choices, memory):
            return planned(ALREADY_FUSED if found.choices else MEMORY_ONLY, None)
        wrapper = fused_classes.wrapper_of(type(module))
        if wrapper is not None:
            return skipped(f"it was fused with other options, and then wrapped by {wrapper}")
    try:
        return planned(verdict, fused_classes.fused_over(original, choices, memory))
    except NoSource as reason:
        return skipped(str(reason))
    except TypeError as error:
        # The metaclass, or the bases, allow no such subclass.
        return skipped(f"its class cannot be subclassed: {error}")


def _nothing_fused(model: nn.Module, report: PatchReport) -> str:
    detail = f"\n{report}\n" if report else " no module multiplies an activated projection by another. "
    return f"patch_model: nothing to fuse in {type(model).__name__}:{detail}Pass strict=False to accept that"
