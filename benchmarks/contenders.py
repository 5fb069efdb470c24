"""What the levels share: dtypes, contenders by torch.compile, and the error for a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WrongResult(Exception):
    """A contender computes something else than eager PyTorch, so that its time has no meaning."""


Contender = TypeVar("Contender", bound=Callable)


def compiled(contender: Contender) -> Contender:
    """The contender by torch.compile, a module in place, so that its forward keeps its signature.

    Earlier compilations are dropped: after eight of one function it would run eager.
    """
    torch.compiler.reset()
    if not isinstance(contender, nn.Module):
        return torch.compile(contender, dynamic=False)  # type: ignore[return-value]
    contender.compile(dynamic=False)
    return contender


def why_not_compiled(device: torch.device) -> str | None:
    """The first line of torch.compile's error, for instance where there is no C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return None
