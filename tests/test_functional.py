"""`swiglu` and `swiglu_packed`: values and gradients in every dtype and layout, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forms import COLUMNS, FORMS, ROWS, every_form, operands
from support.kernel import NO_TABLE
from support.modes import SeenOperators
from support.outcome import assert_as_eager, outcome

from hf_swiglu import backends, dispatch, swiglu, swiglu_packed
from hf_swiglu.testing import assert_close, counted_launches, kernels_at_every_size

DTYPES = backends.KERNEL_DTYPES
needs_kernel = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")
BOTH = ["swiglu_fwd", "swiglu_bwd"]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """So that an output which was not written to its end cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_large_tensors_run_the_kernel(form, dtype):
    with counted_launches() as launches:
        assert_as_eager(*FORMS[form], *operands(form, 19, 9, 101, dtype=dtype))
    assert launches.names == BOTH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_small_tensors_run_pytorch(form, dtype):
    with counted_launches() as launches:
        assert_as_eager(*FORMS[form], *operands(form, 5, 3, 7, dtype=dtype))
    assert launches.names == []


@every_form
def test_float64_runs_pytorch_and_equals_it(form):
    ours, plain = FORMS[form]
    inputs = operands(form, 19, 9, 101, dtype=torch.float64)
    with counted_launches() as launches:
        assert_same(outcome(ours, *inputs), outcome(plain, *inputs))
    assert launches.names == []


@needs_kernel
@pytest.mark.parametrize("differentiated", [False, True], ids=["no gradients", "gradients"])
@every_form
def test_kernels_start_at_the_documented_sizes(form, differentiated):
    smallest = (dispatch.SMALLEST_DIFFERENTIATED if differentiated else dispatch.SMALLEST_KERNEL)["cpu"]
    for elements, expected in ((smallest, []), (smallest + 1, ["swiglu_fwd"])):
        contiguous = operands(form, elements)
        apart = [torch.stack([x, x], dim=-1)[..., 0] for x in contiguous]
        # Contiguous tensors without gradients go to the kernel at every size.
        goes_straight = NO_TABLE is None and not differentiated
        for inputs, names in ((contiguous, ["swiglu_fwd"] if goes_straight else expected), (apart, expected)):
            with counted_launches() as launches:
                FORMS[form][0](*(x.requires_grad_(differentiated) for x in inputs))
            assert launches.names == names


@needs_kernel
@pytest.mark.parametrize("dtype", backends.KERNEL_DTYPES, ids=str)
@every_form
def test_under_a_dispatch_mode_the_operators_compute_the_same(form, dtype):
    """A mode sees both operators; without one the kernels are launched past PyTorch's dispatcher."""
    inputs = operands(form, dtype=dtype)
    with counted_launches() as launches:
        direct = outcome(FORMS[form][0], *inputs)
        with SeenOperators() as seen:
            assert_same(outcome(FORMS[form][0], *inputs), direct)
    assert launches.names == BOTH * 2
    assert seen.names == ["hf_swiglu.swiglu_fwd.default", "hf_swiglu.swiglu_bwd.default"]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_form
def test_the_tolerance_tells_gelu_from_swish(form, dtype):
    def geglu(gate, up=None):
        if form == "packed":
            gate, up = gate.chunk(2, dim=-1)
        return F.gelu(gate) * (gate if up is None else up)

    with pytest.raises(AssertionError, match="root mean square error"):
        assert_as_eager(geglu, FORMS[form][1], *operands(form, 40, 16, dtype=dtype))


@pytest.mark.skipif(NO_TABLE is not None, reason=str(NO_TABLE))
@pytest.mark.parametrize("elements", [1, 70, 20_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_without_gradients_every_size_goes_straight_to_the_kernel(form, dtype, elements):
    ours, plain = FORMS[form]
    inputs = operands(form, 3, elements, dtype=dtype)
    with counted_launches() as launches:
        result = ours(*inputs)
    assert [launch.kernel for launch in launches] == ["swiglu_packed_fwd" if form == "packed" else "swiglu_fwd"]
    assert_close(result, plain(*inputs), plain(*(tensor.double() for tensor in inputs)))


@needs_kernel
@every_form
def test_without_the_exchange_table_results_are_the_same(form, monkeypatch):
    """As with versions of PyTorch that have none."""
    inputs, ours = operands(form), FORMS[form][0]
    expected, differentiated = ours(*inputs), outcome(ours, *inputs)
    monkeypatch.setattr(dispatch, "_c_kernel", lambda name: None)
    assert torch.equal(ours(*inputs), expected)
    assert_same(outcome(ours, *inputs), differentiated)


VIEWS = {
    "contiguous": lambda dtype: torch.randn(136, 128, dtype=dtype),
    "transposed": lambda dtype: torch.randn(128, 136, dtype=dtype).t(),
    "left columns": lambda dtype: torch.randn(136, 200, dtype=dtype)[:, :128],
    "every other column": lambda dtype: torch.randn(136, 256, dtype=dtype)[:, ::2],
    "every other row": lambda dtype: torch.randn(272, 128, dtype=dtype)[::2],
    "one element off": lambda dtype: torch.randn(136 * 128 + 1, dtype=dtype)[1:].view(136, 128),
    "one row, repeated": lambda dtype: torch.randn(128, dtype=dtype).expand(136, 128),
    "one column, repeated": lambda dtype: torch.randn(136, 1, dtype=dtype).expand(136, 128),
    "one value, repeated": lambda dtype: torch.randn((), dtype=dtype).expand(136, 128),
    "lazily negated": lambda dtype: torch._neg_view(torch.randn(136, 128, dtype=dtype)),
}
VIEWS_4D = {
    "channels last": lambda dtype: torch.randn(2, 8, 33, 34, dtype=dtype).to(memory_format=torch.channels_last),
    "transposed batch": lambda dtype: torch.randn(8, 2, 33, 34, dtype=dtype).transpose(0, 1),
    "transposed heads": lambda dtype: torch.randn(2, 33, 8, 34, dtype=dtype).transpose(1, 2),
    "reversed": lambda dtype: torch.randn(34, 33, 8, 2, dtype=dtype).permute(3, 2, 1, 0),
}
ALL_VIEWS = [pytest.param(view, id=name) for name, view in (VIEWS | VIEWS_4D).items()]


@needs_kernel
@kernels_at_every_size()
@pytest.mark.parametrize("view", ALL_VIEWS)
@every_form
def test_any_layout_of_the_inputs(form, view):
    dtype = torch.bfloat16
    inputs = [view(dtype) for _ in range(2 if form == "gated" else 1)]
    with counted_launches() as launches:
        assert_as_eager(*FORMS[form], *inputs)
    # Columns that lie far apart, and memory that is not the values, are eager's: see `dispatch._is_ordinary`.
    in_rows = inputs[0].is_contiguous() or inputs[0].stride(-1) in (1, 2)
    assert launches.names == (BOTH if in_rows and not inputs[0].is_neg() else [])


@needs_kernel
@kernels_at_every_size()
@pytest.mark.parametrize("view", ALL_VIEWS)
@every_form
def test_any_layout_of_the_gradient(form, view):
    grad = view(torch.float32)
    with counted_launches() as launches:
        assert_as_eager(*FORMS[form], *operands(form, *grad.shape), grad_out=grad)
    assert launches.names == (BOTH if not grad.is_neg() else ["swiglu_fwd"])


@needs_kernel
@kernels_at_every_size()
@pytest.mark.parametrize("view", ALL_VIEWS)
@every_form
def test_any_layout_under_a_dispatch_mode(form, view):
    """A mode leads every call past the C kernel that takes tensors as they are."""
    inputs, ours = [view(torch.float32) for _ in range(2 if form == "gated" else 1)], FORMS[form][0]
    with SeenOperators():
        expected = ours(*inputs)
    assert torch.equal(ours(*inputs), expected)
    for grad in (torch.randn_like(expected), view(torch.float32) if form != "packed" else None):
        with SeenOperators():
            dispatched = outcome(ours, *inputs, grad_out=grad)
        assert_same(outcome(ours, *inputs, grad_out=grad), dispatched)


@needs_kernel
@every_form
def test_the_gradient_of_a_sum(form):
    """`.sum().backward()` hands back one number with all strides zero."""
    assert_as_eager(*FORMS[form], *operands(form), grad_out=torch.ones(()).expand(ROWS, COLUMNS))


@needs_kernel
@pytest.mark.parametrize("elements", [4, 4096], ids=["below", "above"])
@pytest.mark.parametrize("form", ["self-gated", "gated"])
def test_a_dense_layout_is_kept_as_eager_keeps_it(form, elements):
    """Code that calls `.view` on the transposed-back result works at every size or at none."""
    inputs = [torch.randn(elements, 8).t() for _ in range(2 if form == "gated" else 1)]
    ours, plain = FORMS[form]
    assert ours(*inputs).stride() == plain(*inputs).stride()


@st.composite
def strided(draw, shape):
    """A bfloat16 tensor of `shape` with permuted, stepped and expanded dimensions, somewhere inside its memory."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(0, 3)) for _ in shape]
    start = draw(st.integers(0, 3))
    sizes = [max(size * step, 1) for size, step in zip(shape, steps, strict=True)]
    memory = torch.randn(math.prod(sizes) + start, dtype=torch.bfloat16)[start:]
    base = memory.view([sizes[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    view = base[tuple(slice(None, None, step or None) for step in steps)]
    return view.expand(shape) if 0 not in shape else torch.randn(shape, dtype=torch.bfloat16)


@st.composite
def cases(draw):
    torch.manual_seed(0)
    form = draw(st.sampled_from(list(FORMS)))
    shape = draw(st.lists(st.integers(0, 9), min_size=form == "packed", max_size=4).map(tuple))
    wide = (*shape[:-1], 2 * shape[-1]) if form == "packed" else shape
    return form, [draw(strided(wide)) for _ in range(2 if form == "gated" else 1)], draw(strided(shape))


@pytest.mark.slow
@needs_kernel
@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_shape_and_strides(case):
    form, inputs, grad = case
    with kernels_at_every_size():
        assert_as_eager(*FORMS[form], *inputs, grad_out=grad)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 6)], ids=str)
@every_form
def test_empty_tensors(form, shape):
    assert_as_eager(*FORMS[form], *operands(form, *shape))


def test_a_tensor_without_dimensions():
    assert swiglu(torch.tensor(2.0)).item() == pytest.approx(3.523188)
    assert swiglu(torch.tensor(2.0), torch.tensor(-1.0)).item() == pytest.approx(-1.761594)


@pytest.mark.parametrize("rows", [3, 150], ids=["below", "above"])
@pytest.mark.parametrize("up_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("gate_dtype", [*DTYPES, torch.float64], ids=str)
def test_mixed_dtypes_follow_promotion(gate_dtype, up_dtype, rows):
    inputs = [torch.randn(rows, 128, dtype=gate_dtype), torch.randn(rows, 128, dtype=up_dtype)]
    common = torch.promote_types(gate_dtype, up_dtype)
    assert swiglu(*inputs).dtype == common
    assert_as_eager(*FORMS["gated"], *inputs, grad_out=torch.randn(rows, 128, dtype=common))


X = torch.zeros(2, 6)
REFUSED = {
    "integer": (lambda: swiglu(X.long()), TypeError, "gate .*floating-point.*int64"),
    "bool": (lambda: swiglu(X.bool()), TypeError, "gate .*floating-point.*bool"),
    "complex": (lambda: swiglu(X.cfloat()), TypeError, "gate .*floating-point.*complex64"),
    "complex up": (lambda: swiglu(X, X.cfloat()), TypeError, "up .*floating-point.*complex64"),
    "integer up": (lambda: swiglu(X, X.int()), TypeError, "up .*floating-point.*int32"),
    "integer packed": (lambda: swiglu_packed(X.int()), TypeError, "gate_up .*floating-point.*int32"),
    "list": (lambda: swiglu([1.0]), TypeError, "gate must be a torch.Tensor; got list"),
    "None": (lambda: swiglu(None), TypeError, "gate must be a torch.Tensor; got NoneType"),
    "array": (lambda: swiglu(X.numpy()), TypeError, "gate must be a torch.Tensor; got ndarray"),
    "number up": (lambda: swiglu(X, 2.0), TypeError, "up must be a torch.Tensor; got float"),
    "array packed": (lambda: swiglu_packed(X.numpy()), TypeError, "gate_up must be a torch.Tensor; got ndarray"),
    "shapes": (lambda: swiglu(X, X[:, :3]), ValueError, r"same shape.*\(2, 6\).*\(2, 3\)"),
    "broadcast": (lambda: swiglu(X, X[:1]), ValueError, r"same shape.*\(2, 6\).*\(1, 6\)"),
    "devices": (lambda: swiglu(X, X.to("meta")), ValueError, "same device.*cpu.*meta"),
    "odd packed": (lambda: swiglu_packed(X[:, :5]), ValueError, r"even.*\(2, 5\)"),
    "packed scalar": (lambda: swiglu_packed(torch.tensor(1.0)), ValueError, r"last dimension.*\(\)"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(call, error, message):
    with counted_launches() as launches, pytest.raises(error, match=message):
        call()
    assert launches.names == []
