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


def as_rows(tensor: Tensor) -> Rows | None:
    """The rows of `tensor`, or None when its leading dimensions do not lie at one regular stride."""
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
    if all(tensor.stride() == tensors[0].stride() for tensor in tensors) and _is_dense(tensors[0]):
        count = tensors[0].numel()
        return [Rows(1, count, count, 1)] * len(tensors)
    cut = [rows for tensor in tensors if (rows := as_rows(tensor)) is not None]
    return cut if len(cut) == len(tensors) else None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order: tensors of equal strides then match up."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
