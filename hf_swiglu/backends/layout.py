"""The order in which a kernel reads a tensor: rows of columns, without a copy."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


class Layout(NamedTuple):
    """A tensor as `rows` runs of `columns` elements, with both strides counted in elements."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int


@functools.lru_cache(maxsize=1024)
def common_layout(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[Layout, ...] | None:
    """The layouts of several tensors of one shape, with the same rows and columns; None where a tensor has no such.

    Cached, because shapes recur, and the computation takes as long as a product of 10,000 elements.
    """
    if all(stride == strides[0] for stride in strides) and _is_dense(shape, strides[0]):
        count = math.prod(shape)
        return (Layout(1, count, count, 1),) * len(strides)
    cut = [rows for stride in strides if (rows := as_rows(shape, stride)) is not None]
    return tuple(cut) if len(cut) == len(strides) else None


def as_rows(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    """The layout of a tensor, or None where its leading dimensions have no single stride."""
    if not shape:
        return Layout(1, 1, 1, 1)
    *lead_sizes, columns = shape
    *lead_strides, column_stride = strides
    rows, row_stride = 1, 0
    for size, stride in zip(reversed(lead_sizes), reversed(lead_strides)):
        if size == 1:
            continue
        if rows == 1:
            row_stride = stride
        elif stride != rows * row_stride:
            return None
        rows *= size
    return Layout(rows, columns, row_stride, column_stride)


@functools.lru_cache(maxsize=1024)
def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements of its storage that a tensor spans, from its first element to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill one run of memory, in any order: tensors of equal strides then have the same order."""
    expected = 1
    for stride, size in sorted(zip(strides, shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
