"""`from_pretrained(..., fusion_config={"swiglu": True})`, where transformers has its fusion registry."""

from __future__ import annotations

from torch import nn

from hf_swiglu import _compat
from hf_swiglu.patching.patch_model import patch_model
from hf_swiglu.patching.survey import survey

NAME = "swiglu"


def register_fusion() -> None:
    """Add the fusion to transformers' registry; does nothing in releases without one."""
    found = _compat.fusion_registry()
    if found is None:
        return
    registry, spec = found

    class SwiGLUFusion(spec):  # type: ignore[misc, valid-type]
        def is_fusable(self, module: nn.Module) -> bool:
            return any(found.choices for _, _, found in survey([("", module)]))

        def make_fused_class(self, original_cls: type[nn.Module]) -> type[nn.Module]:
            return _self_fusing(original_cls)

        def make_transforms(self, config):
            return []

    registry.setdefault(NAME, SwiGLUFusion())


def _self_fusing(original: type[nn.Module]) -> type[nn.Module]:
    """A class whose constructor fuses the instance, if it has a gated product.

    transformers replaces a class by name, for every later load in the process and with any configuration; so whether
    and how to fuse is decided for each instance.
    """

    def __init__(self, *args, **kwargs):
        original.__init__(self, *args, **kwargs)
        self.__class__ = original
        if any(found.choices for _, _, found in survey([("", self)])):
            patch_model(self, strict=False, only=original.__name__)

    members = {"__init__": __init__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    metaclass = type(original)
    return metaclass(original.__name__, (original,), members)  # type: ignore[misc]
