"""Running a module before and after fusion on the same random input."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hf_swiglu.fusion import FusedModule, original_class
from hf_swiglu.recognition import GatedProduct, Product, UntracedProduct

# Relative to the output's norm, in units of the dtype's epsilon: eager rounds the product twice, a kernel once.
# GELU in place of SiLU differs by more than 1e-2.
_TOLERANCE = 8


def compare(
    plan: Iterable[tuple[nn.Module, type[nn.Module], Product]], set_class: Callable[[nn.Module, type], None]
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
    results = []
    # The same seed before every run gives dropout the same mask, and the user's generators are put back.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = _probe(module, found)
        try:
            for cls in (original, fused):
                set_class(module, cls)
                results.append(_run(_function(module, found), probe))
        finally:
            set_class(module, present)
    for what, before, after in zip(("output", "gradient"), *results):
        error = (after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30)
        if not error <= _TOLERANCE * torch.finfo(before.dtype).eps:
            raise RuntimeError(
                f"verify=True found that fusing {original.__name__} changes its {what} by {error:.1e} (relative norm, "
                f"{before.dtype}). Please report this class"
            )


def _function(module: nn.Module, found: Product) -> Callable[[Tensor], Tensor]:
    """What fusing has changed: the module, an experts module's `_apply_gate`, or the expression with the product."""
    if not isinstance(found, UntracedProduct):
        return module if found.method == "forward" else getattr(module, found.method)

    def product(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return getattr(module, found.attribute)(gate) * up

    return product


def _probe(module: nn.Module, found: Product) -> Tensor:
    """A random input of the function that is compared."""
    tensors = [*module.parameters(), *module.buffers()]
    # accelerate's hooks bring offloaded weights in, which lie on the meta device between calls.
    hooked = any("_old_forward" in vars(child) for child in module.modules())
    if any(tensor.is_meta for tensor in tensors) and not hooked:
        raise ValueError("patch_model: verify=True runs the model's MLPs, but its weights are on the meta device")
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta]
    like = floating[0] if floating else torch.empty(0)
    return torch.randn(64, _width(module, found), device=like.device, dtype=like.dtype)


def _width(module: nn.Module, found: Product) -> int:
    for node in found.graph.nodes if isinstance(found, GatedProduct) else ():
        if node.op == "call_module" and node.args and getattr(node.args[0], "op", None) == "placeholder":
            width = getattr(module.get_submodule(str(node.target)), "in_features", None)
            if isinstance(width, int):
                return width
    # The others take any even number of columns.
    return 512


def _run(function: Callable[[Tensor], Tensor], probe: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        results = [function(probe.clone())]
    torch.manual_seed(0)
    with torch.enable_grad():
        leaf = probe.clone().requires_grad_()
        output = function(leaf.view_as(leaf))
        if output.requires_grad:
            results += torch.autograd.grad(output.square().sum(), leaf)
    return results
