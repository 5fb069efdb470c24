"""Lists the source files, each with the first sentence of its docstring or comment: docs/source-files.md.

`python -m tools.source_files > docs/source-files.md`; `tests/test_layout.py` compares.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_swiglu", "benchmarks", "tools", "examples", "tests/support")
HEAD = """# Source files

Each source file with what it is for. [CONTRIBUTING](../CONTRIBUTING.md) shows how the modules are layered.
"""


def folders() -> Iterator[tuple[str, list[Path]]]:
    """Each folder with source files, and the files; folders inside it come after it."""
    for top in FOLDERS:
        paths = [path for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".c", ".h")]
        for folder in sorted({path.parent for path in paths}):
            yield folder.relative_to(ROOT).as_posix(), sorted(path for path in paths if path.parent == folder)


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, or of the first comment of a C file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"/\*(.*?)\*/", text, re.DOTALL)
        text = re.sub(r"\n \*", "\n", comment[1]) if comment else ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.)])(?<!e\.g\.)(?<!etc\.) (?=[A-Z`])", paragraph)[0]


def page() -> str:
    parts = [HEAD]
    for folder, paths in folders():
        rows = [f"| `{path.name}` | {first_sentence(path)} |" for path in paths if path.stat().st_size > 100]
        parts.append(f"\n## {folder}/\n\n| file | content |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
