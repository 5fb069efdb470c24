"""SwiGLU compared with GELU, ReLU and swish: values, slopes, curvatures, and numbers for statements about SwiGLU."""

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
    """A statement about SwiGLU, its numbers, and the inputs for which it holds."""

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
    """The specification's statements about SwiGLU, in numbers. Computed in float64, at steps of 1e-4 from -12 to 12."""
    x = torch.arange(-120_000, 120_001, dtype=torch.float64) / 10_000
    ours, gelu, swish = (curve(name, x) for name in ("SwiGLU", "GELU", "swish"))
    negative = x < 0
    bump, steepest = int(torch.where(negative, ours.value, 0).argmax()), int(ours.slope.argmin())
    over_gelu, over_identity, over_swish = (
        _last_below(x, ours.value - other) for other in (gelu.value, x, swish.value)
    )
    alive = {name: x[negative & (c.slope.abs() > 0.01)][0] for name, c in (("SwiGLU", ours), ("GELU", gelu))}
    at = {value: int((x - value).abs().argmin()) for value in (-6, 2, 6)}
    largest = _largest_finite(torch.float16)
    compared = [f"{ours.value[at[v]]:.3g} against {gelu.value[at[v]]:.3g} at {v}" for v in (2, 6)]
    rows = [
        (
            "small positive output for slightly negative inputs",
            f"at most {ours.value[bump]:.4f}, at x = {x[bump]:.3f}; {ours.value[at[-6]]:.3f} at -6",
            "all x < 0",
        ),
        (
            "slightly stronger than GELU for positive inputs",
            f"above GELU from x = {over_gelu:.3f} on; {', '.join(compared)}",
            f"x > {over_gelu:.3f}; not slightly for large x, where it grows as x^2",
        ),
        (
            "strong for positive inputs",
            f"above swish from {over_swish:.3f} on, above x from {over_identity:.3f}; "
            f"slope {ours.slope[at[2]]:.2f} at 2",
            f"x > {over_identity:.3f}; below x before",
        ),
        (
            "smooth, with a continuous gradient",
            f"second derivative between {ours.curvature.min():.3f} and {ours.curvature.max():.3f}, 1 at 0",
            "everywhere",
        ),
        (
            "kind to gradients",
            f"slope over 0.01 in magnitude down to x = {alive['SwiGLU']:.2f} (GELU: {alive['GELU']:.2f}); "
            f"0 at x = 0 and at {x[bump]:.3f}, {ours.slope[steepest]:.3f} at {x[steepest]:.3f}",
            f"the slope is over 1 from x = {_last_below(x, ours.slope - 1):.3f} on, and grows as 2x",
        ),
        (
            "usable in every dtype",
            f"float16 overflows beyond x = {largest:g}; bfloat16 and float32 only beyond 1e19",
            f"x <= {largest:g} in float16",
        ),
    ]
    return [Fact(*row) for row in rows]


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
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the curves are drawn with matplotlib, which is not installed: pip install matplotlib"
        ) from error
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


def _last_below(x: Tensor, difference: Tensor) -> float:
    """The largest positive x at which a difference is below 0."""
    return x[(x > 0) & (difference < 0)][-1].item()


def _largest_finite(dtype: torch.dtype) -> float:
    x = torch.arange(0, 1024, 0.25).to(dtype)
    return x[swiglu(x).isfinite()][-1].item()
