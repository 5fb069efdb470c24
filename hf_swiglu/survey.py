"""Recognition over a whole model: which modules, and each class and configuration traced once."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Iterable, Sequence

from torch import nn

from hf_swiglu.fusion import FusedModule
from hf_swiglu.recognition import GatedProduct, NotFusable, recognise

Found = GatedProduct | NotFusable


def survey(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, Found]]:
    """Every module that has a gated product, or looks as if it had one, with what was found."""
    known: dict[tuple, Found | None] = {}
    result: list[tuple[str, nn.Module, Found]] = []
    for name, module in modules:
        if isinstance(module, FusedModule):
            result.append((name, module, type(module).found))
            continue
        key = _configuration(module)
        if key not in known:
            known[key] = _recognise(module)
        found = known[key]
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


def _recognise(module: nn.Module) -> Found | None:
    try:
        return recognise(module)
    except NotFusable as reason:
        return reason


def _configuration(module: nn.Module) -> tuple:
    """Equal for two modules whose forwards trace alike.

    Only the attributes that the class's functions name can steer a trace, so a `layer_idx` that nothing reads keeps
    126 layers one configuration.
    """
    named: set[str] = set()
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for function in vars(cls).values():
            if isinstance(function, types.FunctionType) and function.__name__ != "__init__":
                named.update(function.__code__.co_names)
    values = []
    for name in sorted((named & vars(module).keys()) - {"training"}):
        value = vars(module)[name]
        comparable = isinstance(value, (int, float, str, types.NoneType))
        values.append((name, type(value), value if comparable else id(value)))
    children = [
        (name, type(child), getattr(child, "in_features", None), getattr(child, "out_features", None))
        for name, child in module.named_children()
    ]
    return type(module), tuple(values), tuple(children)
