"""The CPU kernel by itself: every dtype, direction, member of the family, CPU capability and memory layout."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_swiglu import reference
from hf_swiglu.backends import unavailable
from hf_swiglu.reference import SILU, SWIGLU, GLUParams
from hf_swiglu.testing import assert_close

if unavailable("cpu"):
    pytest.skip(f"no CPU kernel: {unavailable('cpu')}", allow_module_level=True)

from hf_swiglu.backends import _cpu_kernels, cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPT_OSS = GLUParams(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
STEP = GLUParams(power=2, act_limit=3.0, up_limit=2.0)
MEMBERS = {"silu": SILU, "swiglu": SWIGLU, "gpt_oss": GPT_OSS, "step": STEP}


@pytest.fixture(autouse=True, params=_cpu_kernels.supported_cpu_capabilities())
def capability(request):
    before = _cpu_kernels.cpu_capability()
    _cpu_kernels.use_cpu_capability(request.param)
    yield request.param
    _cpu_kernels.use_cpu_capability(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape, dtype=torch.float32, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def operands(*shape, dtype, has_up=True):
    gate, grad = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, scale=1.0, seed=3)
    return gate, random(*shape, dtype=dtype, seed=2) if has_up else None, grad


def kernel(gate, up, grad, params):
    """Outputs start as NaN, so that what is not written cannot pass."""

    def fresh():
        return torch.full(gate.shape, math.nan, dtype=gate.dtype)

    result = SimpleNamespace(out=fresh(), gate=fresh(), up=None if up is None else fresh())
    cpu.swiglu_fwd(gate, up, result.out, params)
    cpu.swiglu_bwd(grad, gate, up, result.gate, result.up, params)
    return result


def plain(gate, up, grad, params):
    gate = gate.detach().clone().requires_grad_()
    up = None if up is None else up.detach().clone().requires_grad_()
    out = reference.swiglu_fwd(gate, up, params)
    out.backward(grad)
    return SimpleNamespace(out=out.detach(), gate=gate.grad, up=None if up is None else up.grad)


def assert_right(result, gate, up, grad, params):
    eager = plain(gate, up, grad, params)
    exact = plain(gate.double(), None if up is None else up.double(), grad.double(), params)
    for name in ("out", "gate", "up"):
        if getattr(exact, name) is not None:
            assert_close(getattr(result, name), getattr(eager, name), getattr(exact, name))


def assert_same(result, expected):
    for name in ("out", "gate", "up"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("params", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, params, has_up):
    inputs = operands(37, 211, dtype=dtype, has_up=has_up)
    assert_right(kernel(*inputs, params), *inputs, params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_in_place_of_swish_is_noticed(dtype):
    gate, up, _ = operands(37, 211, dtype=dtype)
    exact = reference.swiglu_fwd(gate.double(), up.double())
    with pytest.raises(AssertionError, match="against float64"):
        assert_close(F.gelu(gate) * up, F.silu(gate) * up, exact)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_gradient_of_every_16_bit_number(dtype):
    """A sigmoid that is not quite 1 would show next to a large gate."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ones, grad_gate, grad_up = torch.ones_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    cpu.swiglu_bwd(ones, gate, ones, grad_gate, grad_up, SILU)
    leaf = gate.double().requires_grad_()
    F.silu(leaf).sum().backward()
    expected = leaf.grad
    torch.testing.assert_close(grad_gate.isnan(), expected.isnan())
    # Where the slope crosses zero, its terms are of the size of 1.
    unit = torch.finfo(dtype).eps * expected.abs().clamp(min=0.125)
    wrong = (grad_gate.double() - expected).abs() > unit
    assert not wrong.any(), (gate[wrong][:5], grad_gate[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("params", (SILU, SWIGLU), ids=("silu", "swiglu"))
def test_special_values(params):
    largest, tiny = torch.finfo(torch.float32).max, 1e-45
    values = [0.0, -0.0, tiny, -tiny, 1.0, -1.0, -80.0, 80.0, -100.0, largest, -largest, math.inf, -math.inf, math.nan]
    gate, up = (x.reshape(-1) for x in torch.meshgrid(*2 * [torch.tensor(values)], indexing="ij"))
    grad = torch.ones_like(gate)
    result, expected = kernel(gate, up, grad, params), plain(gate, up, grad, params)
    # With three factors their order decides what overflows: near the largest float only silu is compared.
    compared = (up.abs() < 1e30) & ((gate.abs() < 1e30) | ~gate.isfinite()) | (params == SILU)
    for name in ("out", "gate", "up"):
        torch.testing.assert_close(
            getattr(result, name)[compared], getattr(expected, name)[compared], rtol=1e-6, atol=1e-30, equal_nan=True
        )
    assert torch.equal(result.out.signbit()[gate == 0], expected.out.signbit()[gate == 0])


@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("power", (1, 2))
def test_a_gradient_of_zero_stays_zero_for_every_finite_gate(power, has_up):
    # From 2^127 on, twice the gate is infinite.
    gate = torch.tensor([1e19, 1e30, 1.6e38, 2e38, torch.finfo(torch.float32).max]).repeat(20)
    gate = torch.cat([gate, -gate])
    grad = torch.zeros_like(gate)
    cases = [(GLUParams(power=power, alpha=alpha), torch.ones_like(gate)) for alpha in (1.0, 1.702, 0.5)]
    for params, up in cases:
        result = torch.full_like(gate, math.nan)
        cpu.swiglu_bwd(grad, gate, up if has_up else None, result, torch.empty_like(gate) if has_up else None, params)
        assert torch.equal(result, grad), params


def test_clamps_pass_their_gradient_on_the_limit_as_in_pytorch():
    gate = torch.tensor([6.9, 7.0, 7.1, 3.0, 3.0, 3.0, 3.0, math.inf, math.nan])
    up = torch.tensor([0.5, 0.5, 0.5, 7.0, -7.0, 7.1, -7.1, 0.5, 0.5])
    inputs = gate, up, torch.ones_like(gate)
    result, expected = kernel(*inputs, GPT_OSS), plain(*inputs, GPT_OSS)
    for name in ("out", "gate", "up"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)
    assert result.gate[2] == 0 and result.up[5] == 0 and result.up[6] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail_writes_its_elements_and_no_others(dtype):
    # The largest block is 64 elements.
    for count in range(131):
        gate, up, grad = operands(count, dtype=dtype)
        buffers = [torch.full((count + 64,), 123.0, dtype=dtype) for _ in range(3)]
        out, grad_gate, grad_up = (buffer[32 : 32 + count] for buffer in buffers)
        cpu.swiglu_fwd(gate, up, out, SILU)
        cpu.swiglu_bwd(grad, gate, up, grad_gate, grad_up, SILU)
        for buffer in buffers:
            assert (buffer[:32] == 123).all() and (buffer[32 + count :] == 123).all(), count
        assert_right(SimpleNamespace(out=out, gate=grad_gate, up=grad_up), gate, up, grad, SILU)


def packed(x, y):
    return torch.cat((x, y), dim=-1).chunk(2, dim=-1)


def interleaved(x, y):
    both = torch.stack((x, y), dim=-1).flatten(-2)
    return both[..., ::2], both[..., 1::2]


def column_major(x, y):
    return x.mT.contiguous().mT, y.mT.contiguous().mT


def heads_swapped(x, y):
    return tuple(z.transpose(0, 1).contiguous().transpose(0, 1) for z in (x, y))


@pytest.mark.parametrize("layout", (packed, interleaved, column_major, heads_swapped))
@pytest.mark.parametrize("params", (SILU, GPT_OSS), ids=("silu", "gpt_oss"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands_are_read_and_written_where_they_lie(dtype, params, layout):
    gate, up, grad = operands(3, 5, 701, dtype=dtype)
    expected = kernel(gate, up, grad, params)
    gate_view, up_view = layout(gate, up)
    grad_gate, grad_up = layout(*2 * [torch.full_like(gate, math.nan)])
    out, spare = layout(*2 * [torch.full_like(gate, 123.0)])
    cpu.swiglu_fwd(gate_view, up_view, out, params)
    cpu.swiglu_bwd(grad, gate_view, up_view, grad_gate, grad_up, params)
    assert_same(SimpleNamespace(out=out, gate=grad_gate, up=grad_up), expected)
    assert (spare == 123).all()


@pytest.mark.parametrize("shape", ((), (1,), (700,), (3, 5, 701)))
def test_expanded_gradients(shape):
    gate, up, _ = operands(*shape, dtype=torch.float32)
    grad = torch.tensor(0.7).expand(shape)
    assert_same(kernel(gate, up, grad, SILU), kernel(gate, up, grad.contiguous(), SILU))


@pytest.mark.parametrize("layout", (lambda x, y: (x, y), packed, interleaved))
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_in_place_of_inputs(dtype, layout):
    gate, up, grad = operands(9, 701, dtype=dtype)
    expected = kernel(gate, up, grad, SILU)
    into_gate = layout(gate.clone(), up.clone())
    cpu.swiglu_fwd(*into_gate, into_gate[0], SILU)
    into_both = layout(gate.clone(), up.clone())
    cpu.swiglu_bwd(grad, *into_both, *into_both, SILU)
    assert_same(SimpleNamespace(out=into_gate[0], gate=into_both[0], up=into_both[1]), expected)


@pytest.mark.parametrize("shape", ((100_003,), (401, 251)))
def test_threads_share_the_work_and_change_nothing(shape, threads):
    inputs = operands(*shape, dtype=torch.bfloat16)
    layouts = [inputs, (*packed(*inputs[:2]), inputs[2]), (*interleaved(*inputs[:2]), inputs[2])]
    results = []
    for count in (1, 2, 5):
        threads(count)
        results += [kernel(*operands, SILU) for operands in layouts]
    for result in results[1:]:
        assert_same(result, results[0])
    assert_right(results[0], *inputs, SILU)


def test_torch_and_the_kernel_share_one_thread_pool():
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("the loaded libraries are read from /proc/self/maps, which this system does not have")
    with open("/proc/self/maps") as maps:
        pools = {os.path.realpath(line.split()[-1]) for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(pools) <= 1, pools


def test_mismatched_tensors_are_refused():
    gate, operators = torch.ones(4, 8), torch.ops.hf_swiglu
    with pytest.raises(ValueError, match=r"swiglu_fwd takes .*one shape.*\(4, 8\).*\(4, 7\)"):
        operators.swiglu_fwd(gate, torch.ones(4, 7), gate)
    with pytest.raises(ValueError, match="float64"):
        operators.swiglu_fwd(gate.double(), gate.double(), gate.double())
    with pytest.raises(ValueError, match="bfloat16"):
        operators.swiglu_fwd(gate, gate.bfloat16(), gate)
    with pytest.raises(ValueError, match="give both of them or neither"):
        operators.swiglu_bwd(gate, gate, gate, gate, None)


def test_only_known_capabilities_can_be_used(capability):
    with pytest.raises(ValueError, match="cannot run 'MMX'"):
        _cpu_kernels.use_cpu_capability("MMX")
    with pytest.raises(ValueError, match="cannot run 512"):
        _cpu_kernels.use_cpu_capability(512)
    assert cpu.cpu_capability() == capability


def available_gib():
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0.0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.long
def test_more_elements_than_32_bits_count(capability):
    if capability != _cpu_kernels.supported_cpu_capabilities()[0]:
        pytest.skip("addresses do not depend on the CPU capability; tested with the fastest")
    if available_gib() < 12:
        pytest.skip(f"needs 12 GiB of free memory; {available_gib():.1f} GiB are free")
    x = torch.full((2**31 + 77,), 2.0, dtype=torch.bfloat16)
    x[-1] = 3.0
    two, three = few = torch.tensor([2.0, 3.0], dtype=torch.bfloat16)
    cpu.swiglu_fwd(few, None, few, SWIGLU)
    cpu.swiglu_fwd(x, None, x, SWIGLU)
    assert x[-1] == three and (x[: 2**16] == two).all() and (x[-(2**16) : -1] == two).all()
    assert x[2**31 - 8 : 2**31 + 8].eq(two).all() and x[2**30] == two
