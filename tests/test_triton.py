"""The Triton kernels: on a GPU where there is one, otherwise the same source under Triton's interpreter."""

import importlib.util
import math
import re
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.outcome import outcome

import hf_swiglu
from hf_swiglu import reference
from hf_swiglu.reference import SILU, SWIGLU, GLUParams
from hf_swiglu.testing import assert_close

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from hf_swiglu.backends import triton as compiled

# NumPy's about the infinities under the interpreter, and Triton 3.9's about a default of its next release.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in", "ignore:TRITON_DEFAULT_FP_FUSION")

DEVICE = next((name for name in ("cuda", "xpu") if getattr(torch, name).is_available()), "cpu")
GPT_OSS = GLUParams(alpha=1.702, gate_limit=2.0, up_limit=1.5, up_offset=1.0)
STEP = GLUParams(power=2, act_limit=3.0, up_limit=1.5)
ACTIVATION_PARAMS = {"silu": SILU, "swiglu": SWIGLU, "gpt_oss": GPT_OSS, "step": STEP}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _interpreted():
    """A second copy of the module, whose kernels Triton interprets: it decides when they are decorated."""
    spec = importlib.util.find_spec("hf_swiglu.backends.triton")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


kernels = _interpreted() if DEVICE == "cpu" else compiled


@pytest.fixture(autouse=True)
def _same_numbers_as_a_gpu(monkeypatch):
    """The interpreter truncates to bfloat16, where every GPU rounds to nearest (see the `cvt.rn` test below), and it
    makes zeros of subnormal bfloat16 numbers, where a GPU moves their bits."""
    torch.manual_seed(0)
    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) == (triton.language.float32, triton.language.bfloat16):
            return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        if (source, target) == (triton.language.bfloat16, triton.language.float32):
            return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    names, launch = [], kernels._launch

    def counting(kernel, *args):
        names.append(kernel.fn.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(kernels, "_launch", counting)
    return names


def _random(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape)).to(DEVICE, dtype)


# Two tensors of one shape, as they lie in the models that have this layout.
LAYOUTS = {
    "contiguous": lambda new: (new(5, 701), new(5, 701)),
    "contiguous, full tiles": lambda new: (new(4, 1024), new(4, 1024)),
    "packed": lambda new: new(2, 3, 600).chunk(2, dim=-1),
    "packed, several tiles": lambda new: new(3, 10000).chunk(2, dim=-1),
    "packed, full tiles": lambda new: new(4, 2048).chunk(2, dim=-1),
    "interleaved": lambda new: new(5, 300, 2).unbind(-1),
    "padded rows": lambda new: (new(5, 333)[:, :301], new(5, 320)[:, 3:304]),
    "transposed": lambda new: (new(301, 5).t(), new(301, 5).t()),
    "irregular": lambda new: (new(4, 3, 50).transpose(0, 1), new(3, 4, 50)),
    "scalar": lambda new: (new(2)[0], new(2)[1]),
}


def _pair(layout, dtype):
    return LAYOUTS[layout](lambda *shape: _random(*shape, dtype=dtype))


def _pytorch(grad, gate, up, params, dtype=None):
    """The product, then the gradients of its inputs, in `dtype` or in that of gate."""
    inputs = [tensor.to(dtype or gate.dtype) for tensor in (gate, up) if tensor is not None]

    def product(gate, up=None):
        return reference.swiglu_fwd(gate, up, params)

    return list(outcome(product, *inputs, grad_out=grad.to(inputs[0].dtype)).values())


def _kernel(grad, gate, up, out, grad_gate, grad_up, params=SILU):
    kernels.swiglu_fwd(gate, up, out, params)
    kernels.swiglu_bwd(grad, gate, up, grad_gate, grad_up, params)
    return [tensor for tensor in (out, grad_gate, grad_up) if tensor is not None]


def _assert_accurate(results, grad, gate, up, params=SILU):
    exact = _pytorch(grad, gate, up, params, torch.float64)
    for triple in zip(results, _pytorch(grad, gate, up, params), exact, strict=True):
        assert_close(*triple)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_written_in_place(layout, dtype, launches):
    (gate, up), (grad, out), (grad_gate, grad_up) = (_pair(layout, dtype) for _ in range(3))
    bases = [view if view._base is None else view._base for view in (grad_gate, grad_up)]
    for base in bases:
        base.fill_(7)
    _assert_accurate(_kernel(grad, gate, up, out, grad_gate, grad_up), grad, gate, up)
    kind = "flat" if layout in ("contiguous", "contiguous, full tiles", "irregular", "scalar") else "strided"
    assert launches == [f"_fwd_{kind}", f"_bwd_{kind}"]
    # Nothing was written between the elements of the views.
    grad_gate.fill_(7), grad_up.fill_(7)
    assert all(torch.all(base == 7) for base in bases)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("params", ACTIVATION_PARAMS.values(), ids=ACTIVATION_PARAMS)
def test_every_gating(params, gated, dtype):
    (gate, up), (grad, out), (grad_gate, grad_up) = (_pair("padded rows", dtype) for _ in range(3))
    # What `sum().backward()` passes.
    grad = grad[0, 0].expand_as(gate)
    if not gated:
        up = grad_up = None
    _assert_accurate(_kernel(grad, gate, up, out, grad_gate, grad_up, params), grad, gate, up, params)


@pytest.mark.parametrize("layout", ["contiguous", "packed", "irregular"])
def test_results_may_replace_the_inputs(layout):
    (gate, up), (grad, _) = _pair(layout, torch.float16), _pair(layout, torch.float16)
    product, grad_gate, grad_up = _kernel(grad, gate, up, *(torch.empty_like(gate) for _ in range(3)))
    before = gate.clone()
    kernels.swiglu_fwd(gate, up, gate, SILU)
    assert torch.equal(gate, product)
    gate.copy_(before)
    kernels.swiglu_bwd(grad, gate, up, gate, up, SILU)
    assert torch.equal(gate, grad_gate) and torch.equal(up, grad_up)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_nothing_to_do(shape, launches):
    _kernel(*(torch.empty(shape, device=DEVICE) for _ in range(6)))
    assert launches == []


@pytest.mark.parametrize("params", ACTIVATION_PARAMS.values(), ids=ACTIVATION_PARAMS)
def test_special_values_are_those_of_pytorch(params):
    positive = torch.tensor([0.0, 1e-40, 1.0, 2.0, 50.0, 88.0, 89.0, 100.0, 1e15, math.inf, math.nan], device=DEVICE)
    values = torch.cat([positive, -positive])
    gate, up = (part.flatten() for part in torch.meshgrid(values, values, indexing="ij"))
    grad = torch.ones_like(gate)
    results = _kernel(grad, gate, up, *(torch.empty_like(gate) for _ in range(3)), params)
    for result, usual in zip(results, _pytorch(grad, gate, up, params), strict=True):
        special = (usual == 0) | ~usual.isfinite()
        assert special.sum() > 100
        torch.testing.assert_close(result[special], usual[special], rtol=0, atol=0, equal_nan=True)
        # PyTorch differentiates any other alpha in three steps, whose zeros may be summed to the other sign.
        if params.alpha == 1:
            assert torch.equal(result[usual == 0].signbit(), usual[usual == 0].signbit())
        # And nothing else is special: no overflow, no subnormal flushed to zero.
        assert torch.all((result != 0) & result.isfinite() | special)


def test_addresses_beyond_32_bits():
    # Only a few pages of the 4.3 GB are touched, so on a CPU they cost nothing.
    memory = torch.empty(2**31 + 96, dtype=torch.bfloat16, device=DEVICE)
    for shape, stride in (((2, 16), (2**31, 1)), ((3, 2), (1, 2**31)), ((2, 3), (4, 2**30))):
        grad, gate, up, *results = (memory.as_strided(shape, stride, offset) for offset in range(0, 96, 16))
        for operand in (grad, gate, up):
            operand.copy_(_random(*shape))
        _assert_accurate(_kernel(grad, gate, up, *results), grad, gate, up)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take an hour")
def test_more_elements_than_32_bits_count():
    gate = torch.ones(2**31 + 5000, dtype=torch.bfloat16, device=DEVICE)
    kernels.swiglu_fwd(gate, None, gate, SILU)
    assert torch.all(gate == F.silu(torch.ones_like(gate[:1])))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch dispatches to these kernels on a GPU")
def test_public_functions_run_the_kernels(launches):
    gate, up = (tensor.requires_grad_() for tensor in _random(2, 8, 512, dtype=torch.bfloat16))
    result = hf_swiglu.swiglu(gate, up)
    result.backward(torch.ones_like(result))
    assert launches == ["_fwd_flat", "_bwd_flat"]
    _assert_accurate([result.detach(), gate.grad, up.grad], torch.ones_like(result), gate.detach(), up.detach())


def test_launches_on_the_device_of_the_operands(monkeypatch):
    x, backend, entered = _random(8), getattr(torch, DEVICE), []
    monkeypatch.setattr(backend, "device_count", lambda: 2)
    monkeypatch.setattr(backend, "device", lambda device: entered.append(device) or nullcontext(), raising=False)
    kernels.swiglu_fwd(x, None, x, SILU)
    assert entered == [x.device]


def test_tiles_leave_few_lanes_idle():
    for width in range(144, 20000):
        tile = kernels._tile_columns(width)
        assert -(-width // tile) * tile <= width * 9 / 8


def _compile(target, function, *operands):
    """The assembly of the kernel that this call would launch, specialised as Triton does at run time."""
    with mock.patch.object(compiled, "_launch") as launch:
        function(*operands)
    kernel, _, tensors, *scalars = launch.call_args.args
    signature, constants, alignment = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, (*tensors, *scalars), strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], value = f"*{TYPES[value.dtype]}", value.data_ptr()
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if value % 16 == 0:
            alignment[(index,)] = [["tt.divisibility", 16]]
    assembly = triton.compile(ASTSource(kernel, signature, constants, alignment), target=target).asm
    return assembly["ptx" if target.backend == "cuda" else "amdgcn"]


def _accesses(assembly):
    """How many global loads and stores of each width one thread makes."""
    return Counter(re.findall(r"\b((?:ld|st)\.global\.[\w.]+|global_(?:load|store)_\w+)", assembly))


def _views(packed, dtype=torch.bfloat16, rows=16, width=11008):
    if packed:
        return torch.empty(rows, 2 * width, dtype=dtype).chunk(2, dim=-1)
    return tuple(torch.empty(rows, width, dtype=dtype) for _ in range(2))


# Members of the family whose operators round alike on the CPU and on a GPU; a sum with 0.1, for instance, does not.
SAME_BITS = {
    "silu times up": (SILU, True),
    "silu": (SILU, False),
    "swiglu": (SWIGLU, False),
    "swiglu times up": (SWIGLU, True),
    "clamped": (GLUParams(gate_limit=0.3, up_limit=0.7), True),
    "step-3.7": (GLUParams(act_limit=0.3, up_limit=0.7), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", SAME_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_gate_has_eagers_bits(dtype, form):
    """On a GPU a proof; interpreted, only that the kernel rounds where PyTorch does: exp is NumPy's."""
    params, has_up = SAME_BITS[form]
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(DEVICE)
    up, grad = (torch.randn(2**16).to(DEVICE, dtype) for _ in range(2))
    up = up if has_up else None
    out, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    results = _kernel(grad, gate, up, out, grad_gate, grad_up if has_up else None, params)
    for result, plain in zip(results, _pytorch(grad, gate, up, params), strict=True):
        assert torch.equal(result.isnan(), plain.isnan())
        differing = (result.view(torch.int16) != plain.view(torch.int16)) & ~plain.isnan()
        # Near the middle between two float16 numbers the last bit of exp decides: 4 gates of 65,536 at most.
        assert differing.count_nonzero() <= (4 if dtype is torch.float16 or result is grad_gate else 0)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["contiguous", "packed"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cuda_accesses_are_16_bytes_wide(capability, packed):
    target = GPUTarget("cuda", capability, 32)
    grad, out = _views(False)
    forward = _compile(target, compiled.swiglu_fwd, *_views(packed), out, SILU)
    assert _accesses(forward) == {"ld.global.v4.b32": 4, "st.global.v4.b32": 2}
    backward = _compile(target, compiled.swiglu_bwd, grad, *_views(packed), *_views(packed), SILU)
    assert _accesses(backward) == {"ld.global.v4.b32": 6, "st.global.v4.b32": 4}
    # Full tiles have no masks.
    assert packed or "@%p" not in forward + backward
    # Swish rounds to nearest, and so does its product with up, which the compiler makes of two bfloat16 numbers.
    assert 2 * forward.count("cvt.rn.bf16x2.f32") + forward.count("cvt.rn.bf16.f32") == 16
    products = Counter(re.findall(r"(?:mul|fma)[.\w]*(bf16x2|bf16)\b", forward))
    assert 2 * products["bf16x2"] + products["bf16"] == 16


# Triton compiles the value 1 into the kernel, and passes what needs more than 32 bits as another type.
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 2880), (16, 1), (16, 2880), (1, 2**31)], ids=str)
def test_every_kind_of_size_compiles(shape):
    storage = torch.empty(2 * shape[0], shape[1], dtype=torch.bfloat16)
    pair = storage.view(*shape, 2).unbind(-1)
    for gate, up, out in ((*pair, storage[: shape[0]]), (storage[: shape[0]],) * 3):
        assert _compile(GPUTarget("cuda", 90, 32), compiled.swiglu_fwd, gate, up, out, SILU)


needs_linker = pytest.mark.skipif(
    hasattr(HIPBackend, "path_to_rocm_lld"), reason="this Triton takes the linker for ROCm from an installation of it"
)
GFX942 = pytest.param(GPUTarget("hip", "gfx942", 64), id="gfx942", marks=needs_linker)


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(GPUTarget("cuda", 90, 32), id="sm_90"), GFX942])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("params", ACTIVATION_PARAMS.values(), ids=ACTIVATION_PARAMS)
def test_every_variant_compiles(params, dtype, target):
    wide = "(ld|st).global.v4.b32" if target.backend == "cuda" else "global_(load|store)_dwordx4"
    for gated in (True, False):
        # A width that no tile divides, so that the accesses are masked.
        (gate, up), (grad_gate, grad_up), (grad, out) = (_views(gated, dtype, width=1104) for _ in range(3))
        up, grad_up = (up, grad_up) if gated else (None, None)
        forward = _compile(target, compiled.swiglu_fwd, gate, up, out, params)
        backward = _compile(target, compiled.swiglu_bwd, grad, gate, up, grad_gate, grad_up, params)
        accesses = [*_accesses(forward), *_accesses(backward)]
        assert len(accesses) == 4 and all(re.fullmatch(wide, access) for access in accesses)
