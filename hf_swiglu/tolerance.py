"""The one rule for how far a result may be from the truth, which float64 stands for."""

from __future__ import annotations

from torch import Tensor

# Error allowed for each unit of eager's, and for rounding where eager happens to be exact.
RATIO, FLOOR = 1.5, 1e-6


def why_worse(result: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why `result` is farther from `exact` than plain PyTorch in the same dtype may be; None when it is not.

    The error, a root mean square, may be 1.5 times that of `eager`, + 1e-6.
    """
    error = _root_mean_square(result.double() - exact)
    allowed = RATIO * _root_mean_square(eager.double() - exact) + FLOOR
    return None if error <= allowed else f"error {error:.1e} against float64, {allowed:.1e} allowed"


def _root_mean_square(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()
