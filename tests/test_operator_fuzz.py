"""Operators with any shape, stride, offset, dtype, parameters and special values, against the plain formula.

`make test` tries 200 examples of each form, `make test-fuzz` 2,000: see EXAMPLES.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_swiglu import backends, dispatch, reference
from hf_swiglu.reference import LAYOUTS, SILU, SWIGLU, GLUParams
from hf_swiglu.testing import counted_launches, kernels_at_every_size

if backends.unavailable("cpu"):
    pytest.skip(f"no CPU kernel: {backends.unavailable('cpu')}", allow_module_level=True)

EXAMPLES = int(os.environ.get("HF_SWIGLU_FUZZ_EXAMPLES", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

DTYPES = torch.float32, torch.bfloat16, torch.float16
LIMITS = 0.3, 1.0, 7.0
# Where float32's exp overflows, underflows and becomes subnormal; where 16-bit products overflow.
ENDS = (
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 6e-8, -6e-8, 1e-38, 87.3, -87.3, 88.7, -88.7, -88.8, 103.9,
    -103.9, -104.1, 255.9, 256.0, 65504.0, -65504.0, 3e38, -3e38, -1.2784645, 20.0, -20.0,
)  # fmt: skip
limits = st.sampled_from((math.inf, math.inf, *LIMITS))
params = st.one_of(
    st.sampled_from((SILU, SWIGLU)),
    st.builds(
        GLUParams,
        power=st.sampled_from((1, 2)),
        alpha=st.sampled_from((1.0, 1.702, 0.5)),
        gate_limit=limits,
        act_limit=limits,
        up_limit=limits,
        up_offset=st.sampled_from((0.0, 0.0, 1.0, 0.1)),
    ),
)
sizes = st.one_of(st.integers(0, 9), st.sampled_from((16, 17, 31, 33, 64, 257, 1030)))
shapes = st.lists(sizes, min_size=0, max_size=4).filter(lambda shape: math.prod(shape) <= 20_000)


def contiguous(tensor):
    return tensor.clone()


def shifted(tensor):
    """At an odd offset of its storage."""
    memory = tensor.new_empty(tensor.numel() + 3)
    view = memory[3:].view(tensor.shape)
    return view.copy_(tensor)


def every_second_column(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def first_columns(tensor):
    """Rows that lie apart."""
    if tensor.dim() == 0:
        return tensor.clone()
    wide = torch.cat([tensor, tensor, tensor], dim=-1)
    return wide[..., : tensor.shape[-1]]


def transposed(tensor):
    return tensor.clone() if tensor.dim() < 2 else tensor.transpose(0, -1).contiguous().transpose(0, -1)


def swapped_batch(tensor):
    return tensor.clone() if tensor.dim() < 3 else tensor.transpose(0, 1).contiguous().transpose(0, 1)


LAYERS = contiguous, shifted, every_second_column, first_columns, transposed, swapped_batch
layers = st.sampled_from(LAYERS)


@st.composite
def tensors(draw, shape, dtype):
    """Numbers of one scale, with special values strewn in."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from((1e-3, 1.0, 8.0, 60.0, 1e4)))
    flat = torch.randn(math.prod(shape), generator=generator) * scale
    special = torch.tensor((*ENDS, *LIMITS, *(-limit for limit in LIMITS)))
    chosen = special[torch.randint(len(special), flat.shape, generator=generator)]
    share = draw(st.sampled_from((0.0, 0.1, 0.9)))
    flat = torch.where(torch.rand(flat.shape, generator=generator) < share, chosen, flat)
    return draw(layers)(flat.to(dtype).view(shape))


@st.composite
def gated(draw):
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    return draw(params), *(draw(tensors(shape, dtype)) for _ in range(3))


@st.composite
def packed(draw):
    shape, dtype = draw(shapes.filter(len)), draw(st.sampled_from(DTYPES))
    *lead, width = shape
    gate_up = draw(tensors((*lead, 2 * width), dtype))
    return draw(params), draw(st.sampled_from(sorted(LAYOUTS))), gate_up, draw(tensors(shape, dtype))


@fuzz
@given(gated())
def test_gated(case):
    params, gate, up, grad = case
    check(params, lambda gate, up: dispatch.swiglu(gate, up, params), gate, up, grad)


@fuzz
@given(gated())
def test_the_activation_alone(case):
    params, gate, _, grad = case
    check(params, lambda gate: dispatch.swiglu(gate, None, params), gate, None, grad)


@fuzz
@given(packed())
def test_packed(case):
    params, layout, gate_up, grad = case

    def halves(packed):
        return reference.swiglu_fwd(*LAYOUTS[layout](packed), params)

    with kernels_at_every_size():
        leaf, plain_leaf = (gate_up.clone().requires_grad_() for _ in range(2))
        ours = [dispatch.swiglu_packed(gate_up, params, layout), dispatch.swiglu_packed(leaf, params, layout)]
    plain = halves(plain_leaf)
    for result in ours:
        compare_forward(result.detach(), plain.detach(), params, *LAYOUTS[layout](gate_up))
    ours[1].backward(grad)
    plain.backward(grad)
    gate, up = LAYOUTS[layout](gate_up)
    # Eager adds the gradients of interleaved slices, each with zeros in the other's place: -0 becomes 0.
    ours, theirs = (each + 0.0 if layout == "interleaved" else each for each in (leaf.grad, plain_leaf.grad))
    compare_backward(params, gate, up, grad, LAYOUTS[layout](ours), LAYOUTS[layout](theirs))


@fuzz
@given(gated())
def test_in_place(case):
    params, gate, up, _ = case
    expected = reference.swiglu_fwd(gate, up, params)
    written = gate.clone()
    with kernels_at_every_size(), torch.no_grad():
        result = dispatch.swiglu_inplace(written, up, params)
    compare_forward(result, expected, params, gate, up)


def test_the_kernels_ran():
    with kernels_at_every_size(), counted_launches() as launches:
        test_gated()
    assert len(launches) > EXAMPLES


def check(params, function, gate, up, grad):
    inputs = [tensor for tensor in (gate, up) if tensor is not None]
    leaves, plain_leaves = ([tensor.detach().clone().requires_grad_() for tensor in inputs] for _ in range(2))
    # With the strides of the inputs, which `clone` keeps only where they are dense.
    views = [leaf.as_strided(leaf.shape, leaf.stride()) for leaf in leaves]
    with kernels_at_every_size():
        without = function(*inputs)
        ours = function(*views)
    plain = reference.swiglu_fwd(*(plain_leaves if up is not None else (*plain_leaves, None)), params)
    compare_forward(without, plain.detach(), params, gate, up)
    compare_forward(ours.detach(), plain.detach(), params, gate, up)
    ours.backward(grad)
    plain.backward(grad)
    compare_backward(params, gate, up, grad, [leaf.grad for leaf in leaves], [leaf.grad for leaf in plain_leaves])


def compare_forward(result, plain, params, gate, up):
    assert result.shape == plain.shape and result.dtype == plain.dtype
    if result.dtype != torch.float32:
        assert not steps_apart(result, plain).any()
        return
    exact = reference.swiglu_fwd(gate.double(), up if up is None else up.double(), in_float32(params))
    ordinary = factors(params, gate, up).nan_to_num(posinf=0) <= 1e30
    special = ordinary & ~plain.isfinite()
    torch.testing.assert_close(result[special], plain[special], rtol=0, atol=0, equal_nan=True)
    assert_within(result, plain, exact, units(params, gate) * exact.abs(), factors(params, gate, up))


def compare_backward(params, gate, up, grad, gradients, plain_gradients):
    if gate.dtype != torch.float32:
        steps = [steps_apart(*pair) for pair in zip(gradients, plain_gradients)]
        assert len(steps) == 1 or not steps[1].any(), "the gradient of up"
        # One step in the gradient of swish; a few where two terms of a self-gated gate cancel: docs/numerics.md.
        if params.power == 1 and params.alpha == 1.0:
            assert not steps[0].numel() or steps[0].max() <= 1, "the gradient of gate"
        return
    leaves = [tensor.double().requires_grad_() for tensor in (gate, up) if tensor is not None]
    reference.swiglu_fwd(*(leaves if up is not None else (*leaves, None)), in_float32(params)).backward(grad.double())
    # The terms of gate's gradient cancel where its slope is 0, so its error is that of the terms.
    terms = factors(params, gate, up) * grad.double().abs()
    assert_within(gradients[0], plain_gradients[0], leaves[0].grad, 2 * units(params, gate) * terms, terms)
    if up is not None:
        exact = leaves[1].grad
        bound = units(params, gate) * exact.abs()
        assert_within(gradients[1], plain_gradients[1], exact, bound, factors(params, gate, grad))


def factors(params, gate, up):
    """The magnitude of a product without its sigmoid."""
    other = 1.0 if up is None else up.double().abs() + abs(params.up_offset)
    return (1 + gate.double().abs()) ** params.power * other


def units(params, gate):
    """Allowed errors, in units of the last place: exp magnifies the rounding of alpha * gate."""
    return 8 if params.alpha == 1.0 else 8 * (1 + params.alpha * gate.double().abs())


def in_float32(params):
    """The parameters that a float32 kernel has."""
    return GLUParams(params.power, *(torch.tensor(field, dtype=torch.float32).item() for field in params[1:]))


def assert_within(result, plain, exact, bound, factors):
    """Finite results are within `bound` units of float32's epsilon; where plain PyTorch is finite, the kernel is.

    The sigmoid underflows below float32's smallest normal number, in plain PyTorch as well. In a gradient plain PyTorch
    may overflow on the way to a finite result, or add infinite terms of both signs, where the kernel does not.
    """
    finite = result.isfinite() & plain.isfinite() & exact.isfinite()
    # Of numbers whose product is near the end of the range, either may overflow on the way.
    ordinary = torch.logical_not((factors > 1e30) & factors.isfinite())
    assert not (plain.isfinite() & ~result.isfinite() & ordinary).any()
    smallest = torch.finfo(torch.float32)
    allowed = (bound * smallest.eps + (factors * 4 + 1) * smallest.tiny).nan_to_num(math.inf)[finite]
    error = (result.double() - exact).abs()[finite]
    assert bool((error <= allowed).all()), f"{(error / allowed).max():.1f} times the allowed error"


def steps_apart(result, expected):
    """By how many numbers of the dtype two tensors differ, element by element; NaN equals NaN."""

    def ordered(tensor):
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF) - 1, bits)

    assert torch.equal(result.isnan(), expected.isnan())
    return torch.where(expected.isnan(), 0, (ordered(result) - ordered(expected)).abs())
