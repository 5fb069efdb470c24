"""Helpers for tests of fused MLPs: the tolerance, a counter of kernel launches, and kernels at every size.

    error(result) <= 1.5 * error(eager) + 1e-6

where `eager` is plain PyTorch in the dtype of the result and the error is the root mean square of the difference from
float64. In bfloat16 and float16 results are compared in bits instead, with `torch.equal`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hf_swiglu import backends, dispatch
from hf_swiglu.reference import GLUParams

Tensors = Tensor | Mapping[str, Tensor]

# Error allowed for each unit of eager's, and for rounding where eager happens to be exact.
RATIO, FLOOR = 1.5, 1e-6


def why_not_close(result: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why `result` is not within the tolerance of the float64 `exact`, or None.

    Where `exact`, in the dtype of the result, is NaN or infinite, the result must be the same. Elements at which an
    intermediate result of eager overflows are excluded from eager's error.

    Example:
        >>> import torch
        >>> from torch.nn.functional import gelu, silu
        >>> from hf_swiglu import swiglu
        >>> from hf_swiglu.testing import why_not_close
        >>> x = torch.linspace(-6, 6, 1000)
        >>> eager, exact = x * silu(x), x.double() * silu(x.double())
        >>> why_not_close(swiglu(x), eager, exact) is None
        True
        >>> why_not_close(x * gelu(x), eager, exact)
        'root mean square error 2.7e-01 against float64; 1.9e-06 is allowed in torch.float32'
    """
    if result.dtype != eager.dtype or result.shape != exact.shape:
        given = f"{tuple(result.shape)} {result.dtype}"
        return f"it is {given}; expected {tuple(exact.shape)} {eager.dtype}"
    expected = exact.to(result.dtype)
    finite = expected.isfinite()
    same = (result == expected) | (result.isnan() & expected.isnan())
    if not bool((result.isfinite() == finite).all()) or not bool(same[~finite].all()):
        return "it is NaN or infinite at other elements than float64, or otherwise"
    comparable = finite & eager.isfinite()
    error = _root_mean_square(result[finite].double() - exact[finite])
    allowed = RATIO * _root_mean_square(eager[comparable].double() - exact[comparable]) + FLOOR
    if error <= allowed:
        return None
    return f"root mean square error {error:.1e} against float64; {allowed:.1e} is allowed in {result.dtype}"


def assert_close(result: Tensors, eager: Tensors, exact: Tensors) -> None:
    """Raise an AssertionError with the reason if `result` is not within the tolerance.

    Each argument is a tensor, or a mapping of names to tensors; the error names the first tensor out of tolerance.
    """
    results, eagers, exacts = map(_named, (result, eager, exact))
    if not results.keys() == eagers.keys() == exacts.keys():
        raise AssertionError(f"results are {sorted(results)}, eager {sorted(eagers)}, exact {sorted(exacts)}")
    for name in results:
        reason = why_not_close(results[name], eagers[name], exacts[name])
        if reason is not None:
            raise AssertionError(f"{name}: {reason}")


def _named(tensors: Tensors) -> Mapping[str, Tensor]:
    return {"the result": tensors} if isinstance(tensors, Tensor) else tensors


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    `tensors` are the operator's tensor arguments in order. "swiglu_packed_fwd", which only the C backend has, takes
    gate and up in one tensor.
    """

    kernel: Literal["swiglu_fwd", "swiglu_packed_fwd", "swiglu_bwd"]
    tensors: tuple[Tensor | None, ...]
    params: GLUParams


class Launches(list[Launch]):
    """Launches in order."""

    @property
    def names(self) -> list[str]:
        """The operator of each launch: "swiglu_fwd", also for packed tensors, or "swiglu_bwd"."""
        return [launch.kernel.replace("_packed", "") for launch in self]


@contextlib.contextmanager
def counted_launches(device: str = "cpu") -> Iterator[Launches]:
    """Inside, every kernel launch of this process on `device` ("cpu", or "cuda" and "xpu", which share one backend) is
    appended to the list, which stays empty where no kernel runs on the device.

    Example:
        >>> import torch
        >>> from hf_swiglu import swiglu
        >>> from hf_swiglu.testing import counted_launches
        >>> with counted_launches() as launches:
        ...     _ = swiglu(torch.ones(16, 1024))
        >>> launches.names
        ['swiglu_fwd']
    """
    launches = Launches()
    if backends.unavailable(device) is not None:
        yield launches
        return
    module: Any = backends.cpu_kernels() if device == "cpu" else backends.triton_kernels()
    saved = module.swiglu_fwd, module.swiglu_bwd, dispatch._c_kernel

    def counting(kernel):
        def launch(*operands):
            launches.append(Launch(kernel.__name__, operands[:-1], operands[-1]))
            return kernel(*operands)

        return launch

    def counting_c_kernel(name):
        kernel = saved[2](name)

        def launch(threads, power, limits, *tensors):
            # Tensors that it rejects are passed to the functions above.
            taken = kernel(threads, power, limits, *tensors)
            if taken:
                launches.append(Launch(name, tensors, GLUParams.of_scalars(power, limits)))
            return taken

        return None if kernel is None else launch

    module.swiglu_fwd, module.swiglu_bwd = map(counting, saved[:2])
    if device == "cpu":
        dispatch._c_kernel = counting_c_kernel  # type: ignore[assignment]
    try:
        yield launches
    finally:
        module.swiglu_fwd, module.swiglu_bwd, dispatch._c_kernel = saved


@contextlib.contextmanager
def kernels_at_every_size(smallest: int = 0) -> Iterator[None]:
    """Inside, kernels run for more than `smallest` elements, instead of where they are faster than eager PyTorch."""
    tables = dispatch.SMALLEST_KERNEL, dispatch.SMALLEST_DIFFERENTIATED
    saved = [dict(table) for table in tables]
    for table in tables:
        table.update(dict.fromkeys(table, smallest))
    try:
        yield
    finally:
        for table, before in zip(tables, saved):
            table.update(before)


def _root_mean_square(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item() if difference.numel() else 0.0
