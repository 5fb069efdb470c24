"""The activation `"swiglu"` of transformers: the module, and its place in `ACT2FN`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import activations

from hf_swiglu.functional import swiglu

NAME = "swiglu"

# The entry that `register(overwrite=True)` replaced, by table.
_replaced: dict[int, object] = {}


class SwiGLU(nn.Module):
    r"""Self-gated SwiGLU, element by element.

        SwiGLU(x) = x * swish(x) = x * (x * sigmoid(x))

    Smooth; zero at zero, a small positive bump for small negative inputs (at most 0.4828 at x = -2.218), and close to
    x^2 for large positive ones. Shape and dtype are kept, so it can replace GELU or SiLU in any module. Gated SwiGLU of
    two tensors, after Shazeer (2020, https://arxiv.org/abs/2002.05202), is `hf_swiglu.swiglu(gate, up)`.

    Raises:
        TypeError: the input is not a tensor, or not of a real floating-point dtype.

    Example:
        >>> import torch
        >>> from hf_swiglu import SwiGLU
        >>> SwiGLU()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.2689, 0.0000, 3.5232])
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        return swiglu(hidden_states)


def register(*, overwrite: bool = False) -> None:
    """Register `SwiGLU` as `"swiglu"` in transformers' `ACT2FN` and `ACT2CLS`; a second call changes nothing.

    `import hf_swiglu` calls it. Afterwards `hidden_act="swiglu"` works in any config.

    Raises:
        ValueError: something else is registered under the name. `overwrite=True` replaces it until `unregister()`.

    Example:
        >>> import hf_swiglu
        >>> from transformers.activations import ACT2FN
        >>> ACT2FN["swiglu"]
        SwiGLU()
    """
    for table in _tables():
        present = _entry(table)
        if present not in (None, SwiGLU) and not overwrite:
            raise ValueError(
                f'transformers already has an activation "{NAME}": {present!r}. Call '
                "hf_swiglu.register(overwrite=True) to replace it until hf_swiglu.unregister()"
            )
    for table in _tables():
        present = _entry(table)
        if present is not SwiGLU:
            _replaced[id(table)] = present
            table[NAME] = SwiGLU


def unregister() -> None:
    """Undo `register()`: the tables hold exactly what they held before. A second call changes nothing.

    Example:
        >>> import hf_swiglu
        >>> from transformers.activations import ACT2FN
        >>> hf_swiglu.unregister()
        >>> "swiglu" in ACT2FN
        False
        >>> hf_swiglu.register()
    """
    for table in _tables():
        if _entry(table) is SwiGLU:
            before = _replaced.pop(id(table), None)
            if before is None:
                del table[NAME]
            else:
                table[NAME] = before


def _tables() -> tuple[dict, dict]:
    # ACT2FN is a copy of ACT2CLS, and a few models look activations up in the latter.
    return activations.ACT2FN, activations.ACT2CLS


def _entry(table: dict) -> object | None:
    # ACT2FN instantiates on look-up; `get` of the underlying dict returns what is stored.
    return dict.get(table, NAME)
