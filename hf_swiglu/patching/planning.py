"""Which memory setting a module can have of the one that is asked for, and why it has another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_swiglu.patching import children, rowwise
from hf_swiglu.patching.matching import Gated
from hf_swiglu.patching.memory import DEFAULT_KEEP, Memory
from hf_swiglu.patching.methods import value_of
from hf_swiglu.patching.recognition import Choice
from hf_swiglu.patching.rewriting import consumer, first_projection


def settled(
    asked: Memory, module: nn.Module, original: type[nn.Module], choices: Sequence[Choice], kind: str
) -> tuple[Memory, str]:
    """(the setting of this module, why it is not the one that is asked for)"""
    names = {choice.method.name for choice in choices}
    if kind == "experts" or "_apply_gate" in names:
        return _without(asked, "its experts share the rows")
    shown = rowwise.shown(module, original)
    if shown.not_repeatable:
        return _without(asked, shown.not_repeatable)
    if asked.keep == 1 and (reason := _first_cannot_be_kept(choices, module)):
        return Memory(DEFAULT_KEEP, repeats=True), f"keep=1 is not possible: {reason}"
    if asked.tile is None:
        return asked._replace(repeats=True), ""
    reason = "its projections gather their weights" if children.communicates(module) else shown.not_rowwise
    if reason:
        return Memory(0, repeats=True), f"not tiled: {reason}"
    return asked._replace(repeats=True), ""


def _without(asked: Memory, reason: str) -> tuple[Memory, str]:
    if asked.keep >= DEFAULT_KEEP:
        return asked, ""
    return Memory(), f"{asked} is not possible: {reason}"


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
        return "nothing but its product goes into a call"
    call = first_projection(product, flow)
    if call is None or not isinstance(value_of(call.func, method, module), nn.Module):
        return "gate and up are not the outputs of two projections"
    return ""
