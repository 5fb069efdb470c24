"""Recognition over a whole model: which modules, and each class and configuration traced once."""

from __future__ import annotations

import fnmatch
import types
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from hf_swiglu.fusion import FusedModule
from hf_swiglu.recognition import NotFusable, Product, recognise

Found = Product | NotFusable

_CHILDREN = "children"


def survey(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, Found]]:
    """Every module that has a gated product, or looks as if it had one, with what was found."""
    known: dict[type, list[tuple[dict[str, object], Found | None]]] = defaultdict(list)
    result: list[tuple[str, nn.Module, Found]] = []
    for name, module in modules:
        if isinstance(module, FusedModule):
            result.append((name, module, type(module).found))
            continue
        seen = known[type(module)]
        alike = [row for row in seen if row[0] == _configuration(module, row[0].keys() - {_CHILDREN})]
        if not alike:
            found, reads = _recognise(module)
            alike = [(_configuration(module, reads), found)]
            seen += alike
        if alike[0][1] is not None:
            result.append((name, module, alike[0][1]))
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


def _recognise(module: nn.Module) -> tuple[Found | None, set[str]]:
    reads: set[str] = set()
    try:
        return recognise(module, reads), reads
    except NotFusable as reason:
        return reason, reads


def _configuration(module: nn.Module, reads: Iterable[str]) -> dict[str, object]:
    """Equal for two modules of a class whose traces are alike: the attributes that a trace has read, and the children.

    A `layer_idx` that nothing reads leaves the 126 layers of a model with one configuration.
    """
    values: dict[str, object] = {}
    for name in reads:
        value = vars(module).get(name)
        comparable = isinstance(value, (int, float, str, types.NoneType))
        values[name] = (type(value), value if comparable else id(value))
    values[_CHILDREN] = [
        (name, type(child), getattr(child, "in_features", None), getattr(child, "out_features", None))
        for name, child in module.named_children()
    ]
    return values
