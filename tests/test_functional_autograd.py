"""`swiglu` under autograd: what it keeps, derivatives of every order, and the modes that change how it runs."""

from functools import partial

import pytest
import torch
from support.forms import COLUMNS, FORMS, ROWS, every_form, gated, leaves, operands, random, self_gated
from support.outcome import outcome
from torch.utils.checkpoint import checkpoint

from hf_swiglu import backends, swiglu
from hf_swiglu.testing import assert_close, counted_launches

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


@every_form
def test_only_the_inputs_are_saved_for_backward(form):
    inputs, saved = leaves(form), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        FORMS[form][0](*inputs)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in inputs]


@every_form
def test_a_kept_graph_gives_the_same_gradients_twice(form):
    inputs = leaves(form)
    out, grad = FORMS[form][0](*inputs), random(ROWS, COLUMNS, seed=2)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, kept, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad)


def test_inputs_that_changed_since_raise():
    gate, up = (tensor * 1 for tensor in leaves("gated"))
    out = swiglu(gate, up)
    gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_form
def test_first_and_second_derivatives_numerically(form):
    inputs = leaves(form, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(FORMS[form][0], inputs)
    assert torch.autograd.gradgradcheck(FORMS[form][0], inputs)


def second_derivatives(function, inputs, grad, weights):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    gradients = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
    penalty = sum((gradient * weight).sum() for gradient, weight in zip(gradients, weights, strict=True))
    return [gradient.detach() for gradient in gradients], torch.autograd.grad(penalty, inputs)


# Gate and up that depend on each other: what flows along their own graphs must not be counted twice.
RELATED = {
    "same": (lambda x: swiglu(x, x), lambda x: gated(x, x)),
    "up from gate": (lambda x: swiglu(x, 2 * x), lambda x: gated(x, 2 * x)),
    "gate from up": (lambda x: swiglu(x.sin(), x), lambda x: gated(x.sin(), x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*FORMS, *RELATED])
def test_second_derivatives_behind_the_kernel(form, dtype):
    ours, plain = (FORMS | RELATED)[form]
    inputs = operands("self-gated" if form in RELATED else form, dtype=dtype)
    grad, weights = random(ROWS, COLUMNS, dtype=dtype, seed=2), [tensor.cos() for tensor in inputs]
    with counted_launches() as launches:
        results = second_derivatives(ours, inputs, grad, weights)
    assert launches.names == ["swiglu_fwd"]
    eager = second_derivatives(plain, inputs, grad, weights)
    exact = second_derivatives(plain, *[[t.double() for t in inputs], grad.double(), [w.double() for w in weights]])
    for ours, theirs, truth in zip(results, eager, exact, strict=True):
        for triple in zip(ours, theirs, truth, strict=True):
            assert_close(*triple)


@pytest.mark.parametrize("wanted", ["neither", "gate", "up", "both"])
def test_only_some_inputs_need_a_gradient(wanted):
    gate, up = operands("gated")
    gate.requires_grad_(wanted in ("gate", "both"))
    up.requires_grad_(wanted in ("up", "both"))
    trained = [tensor for tensor in (gate, up) if tensor.requires_grad]
    out, expected = swiglu(gate, up), gated(gate, up)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == bool(trained)
    if trained:
        grad = random(ROWS, COLUMNS, seed=2)
        results, truths = (torch.autograd.grad(product, trained, grad) for product in (out, expected))
        torch.testing.assert_close(results, truths)


@every_form
def test_many_gradients_at_once(form):
    """As in `torch.autograd.functional.jacobian(vectorize=True)`: backward itself runs under vmap."""
    inputs, grads = leaves(form), random(3, ROWS, COLUMNS, seed=2)
    ours, plain = ([*torch.autograd.grad(f(*inputs), inputs, grads, is_grads_batched=True)] for f in FORMS[form])
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every_form
def test_gradient_checkpointing(form, reentrant):
    ours, plain = FORMS[form]
    with counted_launches() as launches:
        result = outcome(partial(checkpoint, ours, use_reentrant=reentrant), *operands(form))
    assert launches.names == ["swiglu_fwd", "swiglu_fwd", "swiglu_bwd"]
    torch.testing.assert_close(result, outcome(plain, *operands(form)))


def test_autocast():
    """Linear gives bfloat16 there, a normalised input stays float32: eager's dtypes, and its gradients."""
    projections = torch.nn.ModuleDict({name: torch.nn.Linear(64, COLUMNS) for name in ("gate", "up")})

    def product(function, wide_up, x):
        with torch.autocast("cpu", torch.bfloat16):
            gate, up = projections["gate"](x), projections["up"](x)
            return function(gate, up.float() if wide_up else up)

    for wide_up in (False, True):
        with counted_launches() as launches:
            result = outcome(partial(product, swiglu, wide_up), random(ROWS, 64), of=projections)
        assert launches.names == ["swiglu_fwd", "swiglu_bwd"]
        eager = outcome(partial(product, gated, wide_up), random(ROWS, 64), of=projections)
        for name in eager:
            assert result[name].dtype == eager[name].dtype
            # Both round to bfloat16 in between, at different places.
            torch.testing.assert_close(result[name], eager[name], rtol=2e-2, atol=2e-2 * eager[name].abs().max().item())


def test_inference_mode_and_parameters_run_the_kernel():
    x = torch.nn.Parameter(random(ROWS, COLUMNS, seed=2))
    with torch.inference_mode(), counted_launches() as launches:
        out = swiglu(x)
        again = swiglu(out)
    assert launches.names == ["swiglu_fwd", "swiglu_fwd"]
    assert out.is_inference()
    torch.testing.assert_close(
        torch.stack([out, again]).clone(), torch.stack([self_gated(x), self_gated(self_gated(x))])
    )
