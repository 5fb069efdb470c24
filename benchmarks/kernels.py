"""Level "kernel": the product by itself, against eager PyTorch, torch.compile, GELU, and the bytes it moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import DTYPES, WrongResult, compiled
from benchmarks.rows import Case, Row
from hf_swiglu import swiglu, swiglu_packed
from hf_swiglu._ops import launch_bwd, launch_fwd
from hf_swiglu.commands.timing import take_turns
from hf_swiglu.reference import SILU, SWIGLU
from hf_swiglu.testing import why_not_close

CPU_SIZES = ((1, 1536), (16, 8192), (2048, 11008))
DEVICE_SIZES = tuple((rows, width) for width in (1536, 8192, 14336, 28672) for rows in (1, 64, 2048, 16384))

Outputs = tuple[Tensor, ...]
Function = Callable[[], Outputs]


def measure(device: torch.device, seconds: float, compile: bool) -> Iterator[Row]:
    """Every direction in every dtype and size."""
    for rows, width in CPU_SIZES if device.type == "cpu" else DEVICE_SIZES:
        for dtype in DTYPES:
            for what, build in DIRECTIONS.items():
                torch.manual_seed(0)
                operands = [torch.randn(rows, 2 * width, device=device).to(DTYPES[dtype]) for _ in range(3)]
                exact, copies, contenders = build(*operands)
                if compile:
                    contenders["compile"] = compiled(contenders["eager"])
                _check(contenders, exact)
                source, target = (torch.empty_like(operands[0][:, :width].contiguous()) for _ in range(2))
                others: dict[str, Callable[[], object]] = {"copy": functools.partial(target.copy_, source)}
                others |= rivals(what, operands[0][:, :width])
                times = take_turns({**contenders, **others}, seconds, device)
                yield Row(Case("kernel", what, dtype, f"{rows} x {width}"), times, copies)


def rivals(what: str, packed: Tensor) -> dict[str, Callable[[], object]]:
    """GELU, for the self-gated product: each is the activation of an MLP without a gate."""
    gelus: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu erf": F.gelu,
        "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    }
    x = packed.contiguous()
    if what == "self-gated":
        return {name: functools.partial(gelu, x) for name, gelu in gelus.items()}
    if what == "self-gated, forward and backward":
        return {name: _training(gelu, x.requires_grad_(), torch.randn_like(x)) for name, gelu in gelus.items()}
    return {}


def _check(contenders: dict[str, Function], exact: Outputs) -> None:
    eager = contenders["eager"]()
    for name, function in contenders.items():
        for result, plain, expected in zip(function(), eager, exact, strict=True):
            reason = why_not_close(result, plain, expected)
            if reason is not None:
                raise WrongResult(f"{name}: {reason}")


def _forward(packed: Tensor, *_: Tensor) -> tuple[Outputs, float, dict[str, Function]]:
    gate, up = (half.contiguous() for half in packed.chunk(2, dim=-1))
    out = torch.empty_like(gate)

    def into() -> Outputs:
        launch_fwd(gate, up, out, SILU)
        return (out,)

    functions = {
        "eager": lambda: (F.silu(gate) * up,),
        "eager into": lambda: _eager_into(gate, up, out),
        "ours": lambda: (swiglu(gate, up),),
        "into": into,
    }
    return (F.silu(gate.double()) * up.double(),), 1.5, functions


def _eager_into(gate: Tensor, up: Tensor, out: Tensor) -> Outputs:
    """Eager's operators into existing memory, which no model runs: compares kernel with kernel."""
    torch.ops.aten.silu.out(gate, out=out)
    return (torch.mul(out, up, out=out),)


def _packed(packed: Tensor, *_: Tensor) -> tuple[Outputs, float, dict[str, Function]]:
    gate, up = packed.chunk(2, dim=-1)
    out = packed.new_empty(gate.shape)

    def eager() -> Outputs:
        gate, up = packed.chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    def into() -> Outputs:
        launch_fwd(gate, up, out, SILU)
        return (out,)

    functions = {
        "eager": eager,
        "eager into": lambda: _eager_into(gate, up, out),
        "ours": lambda: (swiglu_packed(packed),),
        "into": into,
    }
    return (F.silu(gate.double()) * up.double(),), 1.5, functions


def _backward(packed: Tensor, other: Tensor, *_: Tensor) -> tuple[Outputs, float, dict[str, Function]]:
    gate, up = (half.contiguous() for half in packed.chunk(2, dim=-1))
    grad = other[:, : gate.shape[1]].contiguous()
    # Eager's forward has kept it, so its computation is not part of eager's backward.
    kept = F.silu(gate)
    existing = torch.empty_like(gate), torch.empty_like(gate)

    def ours(results: Outputs) -> Outputs:
        grad_gate, grad_up = results
        launch_bwd(grad, gate, up, grad_gate, grad_up, SILU)
        return results

    def eager_into() -> Outputs:
        grad_gate, grad_up = existing
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, torch.mul(grad, kept, out=grad_up)

    functions = {
        "eager": lambda: (torch.ops.aten.silu_backward(grad * up, gate), grad * kept),
        "eager into": eager_into,
        "ours": lambda: ours((torch.empty_like(gate), torch.empty_like(gate))),
        "into": lambda: ours(existing),
    }
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    exact = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, grad.double())
    return exact, 2.5, functions


def _self_gated(packed: Tensor, *_: Tensor) -> tuple[Outputs, float, dict[str, Function]]:
    x = packed[:, : packed.shape[1] // 2].contiguous()
    out = torch.empty_like(x)

    def into() -> Outputs:
        launch_fwd(x, None, out, SWIGLU)
        return (out,)

    functions = {
        "eager": lambda: (x * F.silu(x),),
        "eager into": lambda: _eager_into(x, x, out),
        "ours": lambda: (swiglu(x),),
        "into": into,
    }
    return (x.double() * F.silu(x.double()),), 1.0, functions


def _self_gated_training(packed: Tensor, other: Tensor, *_: Tensor) -> tuple[Outputs, float, dict[str, Function]]:
    x = packed[:, : packed.shape[1] // 2].contiguous().requires_grad_()
    grad = other[:, : x.shape[1]].contiguous()

    leaf = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(leaf * F.silu(leaf), (leaf,), grad.double())
    return exact, 0.0, {"eager": _training(lambda x: x * F.silu(x), x, grad), "ours": _training(swiglu, x, grad)}


def _training(activation: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Function:
    return lambda: torch.autograd.grad(activation(x), (x,), grad)


DIRECTIONS: dict[str, Callable[..., tuple[Outputs, float, dict[str, Function]]]] = {
    "forward": _forward,
    "packed forward": _packed,
    "backward": _backward,
    "self-gated": _self_gated,
    "self-gated, forward and backward": _self_gated_training,
}
