"""The one tolerance of this project: what plain PyTorch is allowed, times one and a half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Error allowed for each unit of eager's, and for rounding where eager happens to be exact.
RATIO, FLOOR = 1.5, 1e-6


def assert_close_to_float64(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """`result` is at most 1.5 times as far from the float64 `exact` as `eager`, PyTorch in the same dtype, + 1e-6.

    What `exact` makes NaN or infinite in the dtype of the result must be the same NaN or infinity there.
    """
    assert result.dtype == eager.dtype and exact.dtype == torch.float64, (result.dtype, eager.dtype, exact.dtype)
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    expected = exact.to(result.dtype)
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite), f"finite elsewhere: {result[result.isfinite() != finite][:8]}"
    torch.testing.assert_close(result[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    # Where eager overflows on the way it has no error to compare with.
    comparable = finite & eager.isfinite()
    error = _largest(result[finite].double() - exact[finite])
    allowed = RATIO * _largest(eager[comparable].double() - exact[comparable]) + FLOOR
    assert error <= allowed, f"error {error:.3e} against float64, {allowed:.3e} allowed in {result.dtype}"


def assert_all_close_to_float64(results: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The same rule for all that a whole model computes: each tensor's relative error, squared and summed up.

    In a model other roundings drown those of the product, and the largest of them is luck: for a kernel that rounds
    every product correctly it is over 1.5 times eager's with 9 of 25 seeds (a tiny Phi-3 in bfloat16).
    """
    assert results.keys() == eager.keys() == exact.keys()

    def error(computed: dict[str, Tensor]) -> float:
        relative = [(computed[name].double() - exact[name]).norm() / exact[name].norm() for name in exact]
        return torch.stack(relative).norm().item()

    allowed = RATIO * error(eager) + FLOOR
    assert error(results) <= allowed, f"error {error(results):.3e} against float64, {allowed:.3e} allowed"


def assert_function_close(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, grad: Tensor | None = None
) -> None:
    """Holds `function(*inputs)`, and its gradients where `grad` is given, to the tolerance of `reference`."""
    results = _outputs(function, inputs, grad)
    eager = _outputs(reference, inputs, grad)
    exact = _outputs(reference, [x.double() for x in inputs], grad if grad is None else grad.double())
    for triple in zip(results, eager, exact, strict=True):
        assert_close_to_float64(*triple)


def _outputs(function: Callable[..., Tensor], inputs, grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        return [function(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
