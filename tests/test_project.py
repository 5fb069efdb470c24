"""What is said in several places about installing the package agrees."""

import re
from pathlib import Path

import pytest

from hf_swiglu import backends

ROOT = Path(__file__).parents[1]


def test_an_extension_that_cannot_be_loaded_is_a_reason(monkeypatch):
    def failing(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(backends.importlib, "import_module", failing)
    assert "cannot be loaded: libgomp.so.1" in backends.unavailable.__wrapped__("cpu")


@pytest.mark.parametrize("extra", ["docs", "wheel"])
def test_extras_are_pinned(extra):
    """Their environments are made from the constraints alone."""
    (line,) = re.findall(rf"^{extra} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    pinned = re.findall(r"^([^#=\s]+)==", (ROOT / f"constraints-{extra}.txt").read_text(), re.MULTILINE)
    assert {name.partition("[")[0] for name in re.findall(r'"([^"]+)"', line)} <= set(pinned)
