"""The numbers of docs/activation.md, computed again."""

import re
from pathlib import Path

import pytest
import torch

from hf_swiglu.commands import curves

PAGE = Path(__file__).parent.parent / "docs" / "activation.md"


def test_the_page_has_the_computed_table():
    assert f"<!-- facts -->\n{curves.markdown()}<!-- end -->" in PAGE.read_text(encoding="utf-8")


def test_slopes_and_curvatures_are_those_of_the_formulas():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    sigma = torch.sigmoid(x)
    curve = curves.curve("SwiGLU", x)
    torch.testing.assert_close(curve.value, x * x * sigma)
    torch.testing.assert_close(curve.slope, x * sigma * (2 + x * (1 - sigma)))
    torch.testing.assert_close(
        curve.curvature, sigma * (2 + 4 * x * (1 - sigma) + x * x * (1 - sigma) * (1 - 2 * sigma))
    )


def test_the_bump_and_the_crossings_are_where_the_facts_say():
    numbers = " ".join(fact.numbers for fact in curves.facts())
    bump = 0.4828, -2.218
    assert f"at most {bump[0]}, at x = {bump[1]}" in numbers
    around = torch.tensor([bump[1] - 0.01, bump[1], bump[1] + 0.01], dtype=torch.float64)
    assert torch.argmax(around**2 * torch.sigmoid(around)) == 1
    above = float(re.search(r"above GELU from x = ([\d.]+)", numbers)[1])
    for x, is_above in ((above - 0.001, False), (above + 0.001, True)):
        x = torch.tensor(x, dtype=torch.float64)
        assert bool(x**2 * torch.sigmoid(x) > torch.nn.functional.gelu(x)) is is_above


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="a development dependency")
    curves.draw(tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 10_000
