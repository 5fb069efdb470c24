"""A plugin of pytest: the extension is the one that HF_SWIGLU_SANITIZED names."""

import importlib.util
import os
import sys

NAME = "hf_swiglu.backends._cpu_kernels"

spec = importlib.util.spec_from_file_location(NAME, os.environ["HF_SWIGLU_SANITIZED"])
assert spec is not None and spec.loader is not None
# OpenMP's library is torch's.
import torch  # noqa: E402, F401

sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
