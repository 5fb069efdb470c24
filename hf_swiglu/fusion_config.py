"""`from_pretrained(..., fusion_config={"swiglu": True})`, where transformers has its fusion registry."""

from __future__ import annotations

from torch import nn

from hf_swiglu.patching import fused
from hf_swiglu.recognition import NotFusable
from hf_swiglu.survey import survey

NAME = "swiglu"


def register() -> None:
    """Put the fusion into transformers' registry; releases without one are left alone."""
    try:
        from transformers.fusion_mapping import _FUSION_REGISTRY, ModuleFusionSpec
    except ImportError:
        return

    class SwiGLUFusion(ModuleFusionSpec):
        def is_fusable(self, module: nn.Module) -> bool:
            return _found(module) is not None

        def make_fused_class(self, original_cls: type[nn.Module]) -> type[nn.Module]:
            return _self_fusing(original_cls)

        def make_transforms(self, config):
            return []

    _FUSION_REGISTRY.setdefault(NAME, SwiGLUFusion())


def _found(module: nn.Module):
    rows = survey([("", module)])
    return rows[0][2] if rows and not isinstance(rows[0][2], NotFusable) and rows[0][2].gating is not None else None


def _self_fusing(original: type[nn.Module]) -> type[nn.Module]:
    """A class whose instances look at themselves once they are built.

    transformers replaces a class by name, for every later load in the process and whatever its configuration; so each
    instance decides for itself whether, and how, it is fused.
    """

    def __init__(self, *args, **kwargs):
        original.__init__(self, *args, **kwargs)
        self.__class__ = original
        found = _found(self)
        if found is not None:
            self.__class__ = fused(original, found)

    members = {"__init__": __init__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    metaclass = type(original)
    return metaclass(original.__name__, (original,), members)  # type: ignore[misc]
