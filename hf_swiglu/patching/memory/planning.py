"""The effective memory setting of a module, and why it differs from the requested one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_swiglu.patching.memory import child_modules, rowwise_proof
from hf_swiglu.patching.memory.settings import DEFAULT_KEEP, Memory
from hf_swiglu.patching.recognition.gated_mlps import Choice
from hf_swiglu.patching.recognition.gated_products import Gated, consumer, first_projection
from hf_swiglu.patching.recognition.methods import value_of


def effective_setting(
    requested: Memory, module: nn.Module, original: type[nn.Module], choices: Sequence[Choice], kind: str
) -> tuple[Memory, str]:
    """(the effective setting of this module, why it differs from the requested one)"""
    names = {choice.method.name for choice in choices}
    if kind == "experts" or "_apply_gate" in names:
        return _without(requested, "its experts share the rows")
    shown = rowwise_proof.shown(module, original)
    if shown.not_repeatable:
        return _without(requested, shown.not_repeatable)
    if requested.keep == 1 and (reason := _first_cannot_be_kept(choices, module)):
        return Memory(DEFAULT_KEEP, repeats=True), f"keep=1 is not possible: {reason}"
    if requested.tile is None:
        return requested._replace(repeats=True), ""
    reason = "its projections gather their weights" if child_modules.communicates(module) else shown.not_rowwise
    if reason:
        return Memory(0, repeats=True), f"not tiled: {reason}"
    return requested._replace(repeats=True), ""


def _without(requested: Memory, reason: str) -> tuple[Memory, str]:
    if requested.keep >= DEFAULT_KEEP:
        return requested, ""
    return Memory(), f"{requested} is not possible: {reason}"


def _first_cannot_be_kept(choices: Sequence[Choice], module: nn.Module) -> str:
    products = [(choice.method, product) for choice in choices for product in choice.products]
    if len(products) != 1:
        return "it has several products"
    ((method, product),) = products
    flow = method.analysis.flow
    assert flow is not None
    if not isinstance(product, Gated):
        return "gate and up are not made by two calls in one product"
    if consumer(product.node, flow) is None:
        return "no call takes its product alone"
    call = first_projection(product, flow)
    if call is None or not isinstance(value_of(call.func, method, module), nn.Module):
        return "gate and up are not the outputs of two projections"
    return ""
