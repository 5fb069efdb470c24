"""How a kernel walks a tensor: rows of columns, read where they lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor as `rows` runs of `columns` elements, with both strides counted in elements."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int


def as_rows(tensor: Tensor, flatten: bool = True) -> Rows | None:
    """The rows of `tensor`, or None when its leading dimensions do not lie at one regular stride.

    A contiguous tensor is a single row where `flatten` allows it: no row ends, nothing to step over.
    """
    if flatten and tensor.is_contiguous():
        count = tensor.numel()
        return Rows(1, count, count, 1)
    if tensor.dim() == 0:
        return Rows(1, 1, 1, 1)
    *lead_sizes, columns = tensor.shape
    *lead_strides, column_stride = tensor.stride()
    rows, row_stride = 1, 0
    for size, stride in zip(reversed(lead_sizes), reversed(lead_strides)):
        if size == 1:
            continue
        if rows == 1:
            row_stride = stride
        elif stride != rows * row_stride:
            return None
        rows *= size
    return Rows(rows, columns, row_stride, column_stride)


def common_rows(*tensors: Tensor) -> list[Rows] | None:
    """The rows of several tensors of one shape, cut alike; None when one of them cannot be cut so."""
    flatten = all(tensor.is_contiguous() for tensor in tensors)
    cut = [as_rows(tensor, flatten) for tensor in tensors]
    return None if None in cut else cut
