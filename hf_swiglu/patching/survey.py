"""Recognition over a whole model: its gated MLPs, and the result for each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from hf_swiglu.patching.recognition.gated_mlps import Found, recognise
from hf_swiglu.patching.recognition.methods import Method, methods_of


def survey(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, Found]]:
    """Every module that has a gated product, or that resembles a gated MLP, with the result of recognition."""
    methods: dict[type, list[Method]] = {}
    result = []
    for name, module in modules:
        cls = type(module)
        if cls not in methods:
            # A fused class may itself have been wrapped; the methods of its original class are read.
            innermost = next((base for base in cls.__mro__ if "_swiglu_original" in vars(base)), None)
            methods[cls] = list(methods_of(cls if innermost is None else innermost._swiglu_original))
        found = recognise(module, methods[cls])
        if found is not None:
            result.append((name, module, found))
    return result


def choose(model: nn.Module, only: str | Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The named modules of `model` whose qualified name or class name matches one of the patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    modules = list(model.named_modules())
    if only is None:
        return modules
    patterns = [only] if isinstance(only, str) else list(only)

    def matches(pattern: str, name: str, module: nn.Module) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(type(module).__name__, pattern)

    unused = [pattern for pattern in patterns if not any(matches(pattern, *named) for named in modules)]
    if unused:
        classes = sorted({type(module).__name__ for _, module in modules})
        raise ValueError(
            f"only={unused!r} matches no module name and no class of {type(model).__name__}, "
            f"whose classes are: {', '.join(classes)}"
        )
    return [named for named in modules if any(matches(pattern, *named) for pattern in patterns)]
