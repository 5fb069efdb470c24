"""The Python blocks of the pages run, in their order and in one namespace for each page.

What a block needs beforehand stands in a comment, which a reader of the page does not see; a folder with the name of
a Hub id takes the place of a download:

    <!-- set-up
    from support.models import tiny_llama
    tiny_llama().save_pretrained("organisation/model")
    -->

Comments directly below a call of `print` are what it prints.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *ROOT.glob("docs/*.md")]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
PART = re.compile(r"^<!-- set-up\n(?P<setup>.*?)^-->|^```python\n(?P<block>.*?)^```", re.MULTILINE | re.DOTALL)


def parts(text):
    """(line number, code, whether readers see it) of each part that runs."""
    for part in PART.finditer(text):
        name = part.lastgroup
        yield text.count("\n", 0, part.start(name)), part[name], name == "block"


def announced(block):
    """What comments say that the block prints."""
    below = re.findall(r"^print\(.*\n((?:# .*\n)+)", block, re.MULTILINE)
    return "".join(re.sub(r"^# ", "", comments, flags=re.MULTILINE) for comments in below)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "test_pages"}
    if page.name == "loading.md" and importlib.util.find_spec("transformers.fusion_mapping") is None:
        pytest.skip("this transformers has no fusion registry")
    for line, code, is_shown in parts(page.read_text()):
        capsys.readouterr()
        # Errors name the page and its line.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
        expected = announced(code) if is_shown else ""
        if expected:
            assert capsys.readouterr().out == expected


def test_no_block_has_a_placeholder():
    for page in PAGES:
        for line, code, _ in parts(page.read_text()):
            assert "..." not in re.sub("#.*", "", code), f"{page}:{line}"


def test_a_block_that_fails_is_named_by_its_line():
    text = "# A page\n\n```python\nx = 1\n```\n\n<!-- set-up\nassert x == 1\n-->\n```python\nprint(x)\n# 1\n```\n"
    assert list(parts(text)) == [(3, "x = 1\n", True), (7, "assert x == 1\n", False), (10, "print(x)\n# 1\n", True)]
    assert announced("print(x)\n# 1\n") == "1\n"
