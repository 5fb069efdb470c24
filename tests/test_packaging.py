"""What pyproject.toml declares: the dependencies that the package imports, and a wheel that holds only the package."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# The stack that the plugin is for: what they do with a patched model is tested, and nothing of them is imported.
NOT_IMPORTED = {"accelerate", "safetensors"}
# torch brings Triton where it exists; without it the backend is unavailable, and the import is not reached. matplotlib
# is the extra "demo", for `hf-swiglu curves --picture`.
NOT_DECLARED = {"triton", "matplotlib"}


def imported() -> set[str]:
    """The top-level names that the package's source imports, without the standard library and itself."""
    names = set()
    for file in (ROOT / "hf_swiglu").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"hf_swiglu"}


def test_the_dependencies_are_what_is_imported():
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in SETTINGS["project"]["dependencies"]}
    assert imported() - NOT_DECLARED == declared - NOT_IMPORTED
    assert declared >= NOT_IMPORTED and not imported() & NOT_IMPORTED


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-newest.txt", "constraints-oldest.txt"])
def test_constraints_pin_every_dependency(file):
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
    missing = {re.match(r"[\w-]+", requirement)[0] for requirement in SETTINGS["project"]["dependencies"]} - pinned
    assert missing == set()


def test_the_wheel_holds_only_the_package():
    packages = setuptools.find_packages(str(ROOT), **SETTINGS["tool"]["setuptools"]["packages"]["find"])
    assert {"hf_swiglu", "hf_swiglu.commands", "hf_swiglu.patching", "hf_swiglu.backends"} <= set(packages)
    assert [name for name in packages if name.split(".")[0] != "hf_swiglu"] == []
    # Without the setting, setuptools would find them: they are packages.
    assert {"tools.model_support", "benchmarks"} <= set(setuptools.find_packages(str(ROOT)))
    for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package} has no {pattern}"
