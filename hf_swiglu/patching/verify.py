"""Running a module before and after fusion on the same random input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_swiglu import _compat
from hf_swiglu.patching.changes import Changes
from hf_swiglu.patching.recognition.gated_mlps import Found
from hf_swiglu.patching.rewriting.fused_classes import FusedModule, class_changes, original_class, wrapper_of
from hf_swiglu.patching.survey import survey

# Relative to the output's norm, in units of the dtype's epsilon. GELU in place of SiLU differs by more than 1e-2.
_TOLERANCE = 8
_ROWS, _PACKED_WIDTH = 64, 512


def compare_fused(model: nn.Module) -> None:
    """`compare` for every module of a model that is already fused."""
    for name, module, found in survey(model.named_modules()):
        if isinstance(module, FusedModule) and wrapper_of(type(module)) is None:
            compare(module, name, original_class(type(module)), type(module), found)


def compare(module: nn.Module, name: str, original: type[nn.Module], fused: type[nn.Module], found: Found) -> None:
    """Compare outputs and gradients of `module` with its original and its fused class, on a random input.

    Raises:
        RuntimeError: they differ by more than rounding, or the module accepts none of the inputs tried.
        ValueError: the module has no weights to run with (the meta device).
    """
    results = []
    changes = Changes(temporary=True)
    # The same seed before every run gives dropout the same mask; `fork_rng` restores the user's generators.
    with torch.random.fork_rng(), changes, changes:
        changes.make(class_changes(module, original))
        function, probe, before = _first_that_runs(module, name, found)
        results.append(before)
        changes.make(class_changes(module, fused))
        results.append(_run(function, probe))
    # A matrix product of fewer rows may sum in another order.
    has_tiles = fused._swiglu_memory.tile is not None if issubclass(fused, FusedModule) else False
    for what, expected, result in zip(("output", "gradient"), *results):
        if what == "output" and not has_tiles and expected.is_cpu and expected.dtype in (torch.bfloat16, torch.float16):
            differing = int(((result != expected) & ~(result.isnan() & expected.isnan())).count_nonzero())
            if differing:
                raise RuntimeError(
                    f"verify=True found that fusing {name} ({original.__name__}) changes {differing} of "
                    f"{expected.numel()} outputs in {expected.dtype}, where bits are to be equal. Please report this "
                    "class"
                )
        error = (result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        if not error <= _TOLERANCE * torch.finfo(expected.dtype).eps:
            raise RuntimeError(
                f"verify=True found that fusing {name} ({original.__name__}) changes its {what} by {error:.1e} "
                f"(relative norm, {expected.dtype}). Please report this class"
            )


def _first_that_runs(
    module: nn.Module, name: str, found: Found
) -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """(function, input, results) before fusion, for the first candidate that raises no error."""
    errors = []
    for function, probe in _candidates(module, found):
        try:
            return function, probe, _run(function, probe)
        except Exception as error:
            # A module may raise any exception for an input that it does not accept.
            errors.append(error)
    reason = f"; the last of {len(errors)} tried raised {errors[-1]!r}" if errors else ""
    raise RuntimeError(
        f"verify=True found no random input that {name} ({type(module).__name__}) accepts{reason}. "
        "Leave it out with only=, or patch without verify"
    )


def _candidates(module: nn.Module, found: Found) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The module with inputs of each width that it might accept, then its methods that take one packed tensor."""
    tensors = [*module.parameters(), *module.buffers()]
    # accelerate's hooks load offloaded weights, which are on the meta device between calls.
    hooked = any(_compat.ACCELERATE_FORWARD in vars(child) for child in module.modules())
    if any(tensor.is_meta for tensor in tensors) and not hooked:
        raise ValueError(
            "patch_model: verify=True runs the model's MLPs, but its weights are on the meta device. Load the weights "
            "first, or patch without verify"
        )
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta]
    like = floating[0] if floating else torch.empty(0)

    def probe(width: int, *, batched: bool = False) -> Tensor:
        probed = torch.randn(_ROWS, width, device=like.device, dtype=like.dtype)
        return probed.unflatten(0, (2, -1)) if batched else probed

    names = [choice.method.name for choice in found.choices]
    if "forward" in names and "_apply_gate" not in names:
        widths = [getattr(child, "in_features", None) for child in module.modules()]
        for width in dict.fromkeys(width for width in widths if isinstance(width, int)):
            yield module, probe(width)
            yield module, probe(width, batched=True)
    for name in names:
        if name != "forward":
            # By name, because fusing replaces the method.
            yield lambda x, name=name: getattr(module, name)(x), probe(_PACKED_WIDTH)  # type: ignore[misc]
    if "forward" not in names:
        for child in module.modules():
            if isinstance(getattr(child, "in_features", None), int):
                yield module, probe(child.in_features)  # type: ignore[arg-type]


def _run(function: Callable[[Tensor], Tensor], probe: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    scored, differentiated = _GradMode(False), _GradMode(True)
    with scored, scored:
        results = [_tensor(function(probe.clone()))]
    torch.manual_seed(0)
    with differentiated, differentiated:
        leaf = probe.clone().requires_grad_()
        output = _tensor(function(leaf.view_as(leaf)))
        if output.requires_grad:
            results += torch.autograd.grad(output.square().sum(), leaf)
    return results


class _GradMode:
    """A grad mode. Entered twice, it is restored also where an interrupt stops the first of its two ends."""

    def __init__(self, enabled: bool):
        self._enabled, self._before = enabled, torch.is_grad_enabled()

    def __enter__(self) -> None:
        torch.set_grad_enabled(self._enabled)

    def __exit__(self, *error: object) -> None:
        torch.set_grad_enabled(self._before)


def _tensor(output: object) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise TypeError(f"it returned {type(first).__name__}, not a tensor")
    return first
