"""What single operators do with the rows of a tensor: those that a forward may call and still be shown row by row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Every element by itself, or together with those of the same place in the other arguments.
ELEMENTWISE = "elementwise"
# Only the first argument is a tensor, and each element of the result is made from the same place in it.
OF_ROWS_ALONE = "of rows alone"
# Along a dimension that is to be the last.
REDUCTIONS, SPLITS = "reductions", "splits"
# Over the last dimension, with weights.
LINEAR = "linear"

_ARITHMETIC = (
    "add", "sub", "mul", "multiply", "div", "divide", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg", "abs",
    "exp", "log", "tanh", "sigmoid", "relu", "maximum", "minimum", "clamp", "clip", "clamp_min", "clamp_max", "where",
    "sign", "round",
)  # fmt: skip
_ACTIVATIONS = (
    "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid",
    "softplus", "logsigmoid", "sigmoid", "tanh",
)  # fmt: skip
_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach")
_OVER_LAST = ("mean", "sum", "var", "std", "amax", "amin")

METHODS: dict[str, str] = {
    **dict.fromkeys(_ARITHMETIC, ELEMENTWISE),
    **dict.fromkeys(_CASTS, OF_ROWS_ALONE),
    **dict.fromkeys(_OVER_LAST, REDUCTIONS),
    **dict.fromkeys(("chunk", "split"), SPLITS),
}

# Methods of a tensor that no input goes into, a weight for instance, that write to nothing.
OF_WEIGHTS = {*METHODS, "max", "min", "t", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand"}

# Only what is PyTorch's own at import is meant: a function that was put in its place is not in these.
FUNCTIONS: dict[Any, str] = {
    **{getattr(torch, name): ELEMENTWISE for name in _ARITHMETIC if hasattr(torch, name)},
    **{getattr(torch, name): REDUCTIONS for name in _OVER_LAST},
    **{getattr(F, name): OF_ROWS_ALONE for name in _ACTIVATIONS},
    torch.chunk: SPLITS,
    torch.split: SPLITS,
    F.dropout: OF_ROWS_ALONE,
    F.linear: LINEAR,
}


def acts_on_last_dimension(value: Any) -> bool:
    """Whether a value that no input went into changes each row alike where it is broadcast: a number, a vector."""
    return isinstance(value, (int, float, torch.dtype)) or (isinstance(value, Tensor) and value.dim() <= 1)
