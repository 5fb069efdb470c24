"""SwiGLU beside GELU, ReLU and swish: values, slopes, curvatures, and the numbers behind what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

from hf_swiglu.functional import swiglu

LOW, HIGH, STEP = -6.0, 6.0, 0.01
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"SwiGLU": swiglu, "GELU": F.gelu, "ReLU": F.relu, "swish": F.silu}
# Blue, orange, grey and green of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {"SwiGLU": "#0072B2", "GELU": "#E69F00", "ReLU": "#7F7F7F", "swish": "#009E73"}


@dataclass(frozen=True)
class Curve:
    """A function over inputs: its values, first and second derivatives."""

    x: Tensor
    value: Tensor
    slope: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Fact:
    """A sentence about SwiGLU, the numbers behind it, and where it holds."""

    sentence: str
    numbers: str
    holds: str


def curve(name: str, x: Tensor) -> Curve:
    """The curve of one of `FUNCTIONS`, by autograd.

    Example:
        >>> import torch
        >>> from hf_swiglu.commands.curves import curve
        >>> curve("SwiGLU", torch.tensor([0.0, 2.0])).slope
        tensor([0.0000, 3.9432])
    """
    leaf = x.clone().requires_grad_()
    value = FUNCTIONS[name](leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    curvature = torch.zeros_like(x)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), leaf)
    return Curve(x, value.detach(), slope.detach(), curvature.detach())


def facts() -> list[Fact]:
    """What the specification says of SwiGLU, in numbers. Computed in float64, at steps of 1e-4 from -12 to 12."""
    x = torch.arange(-120_000, 120_001, dtype=torch.float64) / 10_000
    ours, gelu, swish = (curve(name, x) for name in ("SwiGLU", "GELU", "swish"))
    negative, positive = x < 0, x > 0
    bump = int(torch.where(negative, ours.value, 0).argmax())
    steepest = int(ours.slope.argmin())
    over_gelu = _last_below(x, ours.value - gelu.value)
    over_identity = _last_below(x, ours.value - x)
    over_swish = _last_below(x, ours.value - swish.value)
    slope_over_one = _last_below(x, ours.slope - 1)
    vanishing = {
        name: -x[negative & (c.slope.abs() > 0.01)][0].item() for name, c in (("SwiGLU", ours), ("GELU", gelu))
    }
    largest = _largest_finite(torch.float16)
    return [
        Fact(
            "small positive output for slightly negative inputs",
            f"at most {ours.value[bump]:.4f}, at x = {x[bump]:.3f}; {_at(ours, x, -6):.3f} at -6",
            "all x < 0",
        ),
        Fact(
            "slightly stronger than GELU for positive inputs",
            f"above GELU from x = {over_gelu:.3f} on; {_at(ours, x, 2):.2f} against {_at(gelu, x, 2):.2f} at 2, "
            f"{_at(ours, x, 6):.1f} against {_at(gelu, x, 6):.1f} at 6",
            f"x > {over_gelu:.3f}; not slightly for large x, where it grows as x^2",
        ),
        Fact(
            "strong for positive inputs",
            f"above swish from x = {over_swish:.3f} on, above x from {over_identity:.3f} on; slope {_slope_at(ours, x, 2):.2f} at 2",
            f"x > {over_identity:.3f}; below x before",
        ),
        Fact(
            "smooth, with a continuous gradient",
            f"second derivative between {ours.curvature.min():.3f} and {ours.curvature.max():.3f}, 1 at 0",
            "everywhere",
        ),
        Fact(
            "kind to gradients",
            f"slope over 0.01 in magnitude down to x = -{vanishing['SwiGLU']:.2f} (GELU: -{vanishing['GELU']:.2f}); "
            f"0 at x = 0 and at {x[bump]:.3f}, {ours.slope[steepest]:.3f} at {x[steepest]:.3f}",
            f"the slope is over 1 from x = {slope_over_one:.3f} on, and grows as 2x",
        ),
        Fact(
            "usable in every dtype",
            f"float16 overflows beyond |x| = {largest:g}; bfloat16 and float32 only beyond 1e19",
            f"x <= {largest:g} in float16",
        ),
    ]


def table() -> Table:
    """The facts for a terminal."""
    rows = Table("SwiGLU is", "numbers", "holds for", box=box.SIMPLE, show_lines=True)
    for fact in facts():
        rows.add_row(fact.sentence, fact.numbers, fact.holds)
    return rows


def markdown() -> str:
    """The facts as a table of docs/activation.md."""
    lines = ["| SwiGLU is | numbers | holds for |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {fact.sentence} | {fact.numbers} | {fact.holds} |" for fact in facts())]) + "\n"


def draw(file: Path) -> None:
    """Draw values, slopes and curvatures over [-6, 6].

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x = torch.arange(LOW, HIGH + STEP / 2, STEP)
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), constrained_layout=True)
    limits = {"value": (-0.7, 6), "slope": (-0.6, 4), "curvature": (-0.4, 2.6)}
    for panel, (what, (low, high)) in zip(panels, limits.items()):
        for name in reversed(FUNCTIONS):
            y = getattr(curve(name, x), what)
            panel.plot(x, y, color=_COLOURS[name], linewidth=3 if name == "SwiGLU" else 2, label=name)
        panel.set(xlim=(LOW, HIGH), ylim=(low, high))
        panel.set_title({"value": "f(x)", "slope": "f'(x)", "curvature": "f''(x)"}[what], fontsize=18)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.tick_params(labelsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(handles[::-1], labels[::-1], loc="upper left", fontsize=14, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _at(curve: Curve, x: Tensor, at: float) -> float:
    return curve.value[int((x - at).abs().argmin())].item()


def _slope_at(curve: Curve, x: Tensor, at: float) -> float:
    return curve.slope[int((x - at).abs().argmin())].item()


def _last_below(x: Tensor, difference: Tensor) -> float:
    """The largest positive x at which a difference is below 0."""
    return x[(x > 0) & (difference < 0)][-1].item()


def _largest_finite(dtype: torch.dtype) -> float:
    x = torch.arange(0, 1024, 0.25).to(dtype)
    return x[swiglu(x).isfinite()][-1].item()
