"""Running a module before and after fusion on the same random input."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

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
        ValueError: the module has no weights to run with (the meta device).
    """
    seen = set()
    for module, fused, found in plan:
        original = type(module)
        if (original, fused) in seen:
            continue
        seen.add((original, fused))
        probe = _probe(module, found)
        before = _run(module, probe)
        set_class(module, fused)
        try:
            after = _run(module, probe)
        finally:
            set_class(module, original)
        error = (after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30)
        if not error <= _TOLERANCE * torch.finfo(before.dtype).eps:
            raise RuntimeError(
                f"patch_model: verify=True found that fusing {original.__name__} changes its output by "
                f"{error:.1e} (relative norm, {before.dtype}); the model was left as it was. Please report this class"
            )


def _probe(module: nn.Module, found: GatedProduct) -> Tensor:
    first = found.packed[0] if found.packed is not None else found.gate
    projection = module.get_submodule(first.target)
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
