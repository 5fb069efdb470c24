"""The map in CONTRIBUTING.md is true: every module is on it, and imports point downwards only."""

import ast
import functools
import re
from pathlib import Path

import pytest

import hf_swiglu
from tools.source_files import page

PACKAGE = Path(hf_swiglu.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


@functools.cache
def floors():
    """Each room of the map with the number of its line, counted from the top."""
    block = re.search(r"## Where things live\n.*?```\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)[1]
    lines = [re.split(r" {2,}", line, maxsplit=1)[0].split(", ") for line in block.splitlines() if line[0] != " "]
    return {room: floor for floor, rooms in enumerate(lines) for room in rooms}


def modules():
    """The path of every module, by its name below the package."""
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {re.sub(r"\.?__init__$", "", name) or "hf_swiglu": path for path, name in names.items()}


def room(module):
    """The innermost room of the map that the module is in."""
    names = module.split(".")
    inside = [".".join(names[:length]) for length in range(len(names), 0, -1)]
    return next((name for name in inside if name in floors()), names[0])


def imported(source, module, known):
    """The modules of the package that `source` imports, at its top or in functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports are not used in this package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] != "hf_swiglu":
                continue
            inside = name.removeprefix("hf_swiglu").removeprefix(".")
            while inside and inside not in known:
                # A name in a module, such as a function.
                inside = inside.rpartition(".")[0]
            found.add(inside or "hf_swiglu")
    return found - {module}


def upward(module, targets, floor):
    """The imports that do not point to a lower room, or stay in their own."""
    return [target for target in targets if room(target) != room(module) and floor[room(target)] <= floor[room(module)]]


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {module: imported(path.read_text(), module, known) for module, path in known.items()}


def test_the_list_of_source_files_is_up_to_date():
    listed = CONTRIBUTING.with_name("docs") / "source-files.md"
    assert listed.read_text() == page(), "run `python -m tools.source_files > docs/source-files.md`"
    assert not re.findall(r"^\| .* \|  \|$", listed.read_text(), re.MULTILINE), "a file has no first sentence"


def test_every_module_is_on_the_map_and_every_room_exists():
    assert {room(module) for module in modules()} == set(floors())


def test_imports_point_downwards_only(graph):
    floor = floors()
    wrong = {module: bad for module, targets in graph.items() if (bad := upward(module, targets, floor))}
    assert not wrong


def test_no_module_imports_itself_through_others(graph):
    reached, pending = {}, dict(graph)
    while pending:
        leaves = [module for module, targets in pending.items() if targets <= reached.keys()]
        assert leaves, f"a cycle among {sorted(pending)}"
        reached |= {module: pending.pop(module) for module in leaves}


@pytest.mark.parametrize(
    "source",
    [
        "from hf_swiglu import dispatch",
        "import hf_swiglu.dispatch",
        "def late():\n    from hf_swiglu.dispatch import swiglu",
        "from hf_swiglu import patch_model",
        "if True:\n    from hf_swiglu.patching.patch_on_load import patch_on_load",
    ],
)
def test_an_upward_import_is_found(source):
    assert upward("backends.cpu", imported(source, "backends.cpu", modules()), floors())
