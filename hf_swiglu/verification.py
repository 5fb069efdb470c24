"""Running a module before and after fusion on the same random input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_swiglu.fusion import FusedModule, original_class
from hf_swiglu.recognition import GatedProduct

# Relative to the output's norm, in units of the dtype's epsilon: eager rounds the product twice, a kernel once.
# GELU in place of SiLU differs by more than 1e-2.
_TOLERANCE = 8


def compare(
    plan: Iterable[tuple[nn.Module, type[nn.Module], GatedProduct]], set_class: Callable[[nn.Module, type], None]
) -> None:
    """Run one module of each distinct class as it is and as its fused class, and compare the outputs.

    Raises:
        RuntimeError: they differ by more than rounding.
        ValueError: a module has no weights to run with (the meta device).
    """
    for (original, fused), (module, found) in {(type(row[0]), row[1]): (row[0], row[2]) for row in plan}.items():
        _compare_classes(module, original, fused, found, set_class)


def compare_fused(model: nn.Module, set_class: Callable[[nn.Module, type], None]) -> None:
    """`compare` for a model that is already fused."""
    modules = {type(module): module for module in model.modules() if isinstance(module, FusedModule)}
    for fused, module in modules.items():
        _compare_classes(module, original_class(fused), fused, fused.found, set_class)


def _compare_classes(module, original, fused, found, set_class) -> None:
    present = type(module)
    arguments = _probe(module, found)
    outputs = []
    try:
        for cls in (original, fused):
            set_class(module, cls)
            outputs.append(_run(module, arguments))
    finally:
        set_class(module, present)
    before, after = (output.double() for output in outputs)
    error = (after - before).norm() / before.norm().clamp(min=1e-30)
    if not error <= _TOLERANCE * torch.finfo(outputs[0].dtype).eps:
        raise RuntimeError(
            f"verify=True found that fusing {original.__name__} changes its output by {error:.1e} (relative norm, "
            f"{outputs[0].dtype}). Please report this class"
        )


def _probe(module: nn.Module, found: GatedProduct) -> Tensor:
    first = found.packed[0] if found.packed is not None else found.gate
    projection: Any = module.get_submodule(str(first.target))
    weight = next(projection.parameters())
    if weight.is_meta and "_old_forward" not in vars(projection):
        raise ValueError("patch_model: verify=True runs the model's MLPs, but its weights are on the meta device")
    device = "cpu" if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return torch.randn(64, projection.in_features, device=device, dtype=dtype)


def _run(module: nn.Module, probe: Tensor) -> Tensor:
    # The same seed before both runs gives dropout the same mask.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return module(probe.clone())
