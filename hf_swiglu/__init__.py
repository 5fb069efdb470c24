"""SwiGLU for Hugging Face transformers: the activation `"swiglu"`, and fused gates for LLaMA-style MLPs."""

import warnings

from hf_swiglu._version import __version__
from hf_swiglu.activation import SwiGLU, register, unregister
from hf_swiglu.backends import available_backends
from hf_swiglu.functional import swiglu, swiglu_packed
from hf_swiglu.patching.fusion_config import register_fusion as _register_fusion
from hf_swiglu.patching.patch_model import patch_model, unpatch_model
from hf_swiglu.patching.patch_on_load import patch_on_load
from hf_swiglu.patching.report import PatchReport

__all__ = [
    "PatchReport",
    "SwiGLU",
    "__version__",
    "available_backends",
    "patch_model",
    "patch_on_load",
    "register",
    "swiglu",
    "swiglu_packed",
    "unpatch_model",
    "unregister",
]

try:
    register()
except ValueError as error:
    # An import that fails could not offer `register(overwrite=True)`.
    warnings.warn(str(error), stacklevel=2)
_register_fusion()
