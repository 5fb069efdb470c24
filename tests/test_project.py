"""What is said in several places about installing the package agrees."""

import re
from pathlib import Path

import pytest
import yaml

import hf_swiglu
from hf_swiglu import backends

ROOT = Path(__file__).parents[1]


def test_an_extension_that_cannot_be_loaded_is_a_reason(monkeypatch):
    def failing(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    # Where it was not built, as if it had been.
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(backends.importlib, "import_module", failing)
    assert "cannot be loaded: libgomp.so.1" in backends.unavailable.__wrapped__("cpu")


@pytest.mark.parametrize("extra", ["docs", "wheel"])
def test_extras_are_pinned(extra):
    """Their environments are made from the constraints alone."""
    (line,) = re.findall(rf"^{extra} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    pinned = re.findall(r"^([^#=\s]+)==", (ROOT / f"constraints-{extra}.txt").read_text(), re.MULTILINE)
    assert {name.partition("[")[0] for name in re.findall(r'"([^"]+)"', line)} <= set(pinned)


def test_the_workflow_runs_the_floors_and_the_newest():
    pyproject = (ROOT / "pyproject.toml").read_text()
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["versions"]["strategy"][
        "matrix"
    ]
    runs = {(run["torch"], run["transformers"]) for run in matrix["include"]}
    floors = [re.search(rf'"{name}>=([\d.]+)"', pyproject)[1] + ".0" for name in ("torch", "transformers")]
    assert tuple(floors) in runs
    for file in ("constraints.txt", "constraints-newest.txt"):
        pins = dict(re.findall(r"^([^#=\s]+)==(.*)$", (ROOT / file).read_text(), re.MULTILINE))
        assert (pins["torch"], pins["transformers"]) in runs
    pythons = {run["python"] for run in matrix["include"]} | {"3.11"}
    assert pythons == set(re.findall(r"Python :: (3\.\d+)", pyproject))


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    assert {f"::: hf_swiglu.{name}" for name in hf_swiglu.__all__ if name != "__version__"} <= set(page.splitlines())


def test_the_version_to_cite_is_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hf_swiglu.__version__
