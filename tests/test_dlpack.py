"""How the C kernels read tensors: DLPack's exchange API or addresses, and tensors without the memory they need."""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import sys

import pytest
import torch

from hf_swiglu import _compat, backends
from hf_swiglu.reference import SILU

if backends.unavailable("cpu"):
    pytest.skip(f"no CPU kernel: {backends.unavailable('cpu')}", allow_module_level=True)

from hf_swiglu.backends import _cpu_kernels, cpu

needs_dlpack = pytest.mark.skipif(
    _compat.exchange_api is None, reason=f"torch {torch.__version__} has no Tensor.__dlpack_c_exchange_api__"
)
# The words of DLPackExchangeAPI on 64-bit processors: versions, prev_api and five functions.
VERSION, FUNCTION, SLOTS = 0, 5, 7

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p,) * 3
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Capsule:
    """A capsule of a copy of PyTorch's exchange API with one word replaced, and the memory that it points to."""

    def __init__(self, word: int, value: int, name: bytes = b"dlpack_exchange_api"):
        original = (ctypes.c_uint64 * SLOTS).from_address(_pointer(_compat.exchange_api, b"dlpack_exchange_api"))
        self.name, self.table = ctypes.create_string_buffer(name), (ctypes.c_uint64 * SLOTS)(*original)
        self.table[word] = value
        self.capsule = _new_capsule(ctypes.addressof(self.table), ctypes.addressof(self.name), None)


UNUSABLE = {
    "absent": lambda: None,
    "no capsule": lambda: 7,
    "another name": lambda: Capsule(VERSION, 1, name=b"dltensor"),
    "version 2": lambda: Capsule(VERSION, 2),
    "version 0": lambda: Capsule(VERSION, 0),
    "no function": lambda: Capsule(FUNCTION, 0),
}


@pytest.fixture
def restored():
    yield
    importlib.reload(cpu)


def product_by_every_path():
    gate, up, out = torch.randn(4, 96), torch.randn(4, 96), torch.empty(4, 96)
    cpu.swiglu_fwd(gate, up, out, SILU)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
    return _cpu_kernels.swiglu_fwd(1, 1, None, gate, up, out)


@needs_dlpack
def test_contiguous_tensors_are_read_by_dlpack():
    assert product_by_every_path()
    assert cpu.tensor_kernel("swiglu_packed_fwd") is _cpu_kernels.swiglu_packed_fwd


@needs_dlpack
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unknown_exchange_api_turns_dlpack_off_and_addresses_are_passed(case, monkeypatch):
    api = UNUSABLE[case]()
    monkeypatch.setattr(_compat, "exchange_api", getattr(api, "capsule", api))
    importlib.reload(cpu)
    assert cpu.tensor_kernel("swiglu_fwd") is None
    assert not product_by_every_path()


@needs_dlpack
@pytest.mark.usefixtures("restored")
def test_a_newer_minor_version_is_read():
    api = Capsule(VERSION, 1 | 99 << 32)
    assert _cpu_kernels.use_dlpack_exchange_api(torch.Tensor, api.capsule)
    assert product_by_every_path()


@pytest.mark.parametrize("value", ("None", "7", "removed"))
def test_the_package_imports_without_the_exchange_api(value):
    change = "del torch.Tensor.__dlpack_c_exchange_api__"
    if value != "removed":
        change = f"torch.Tensor.__dlpack_c_exchange_api__ = {value}"
    elif _compat.exchange_api is None:
        pytest.skip("this PyTorch has none to remove")
    script = f"""
import torch
{change}
import hf_swiglu
from hf_swiglu.backends import cpu
assert cpu.tensor_kernel("swiglu_fwd") is None
x = torch.ones(2, 20_000)
assert torch.allclose(hf_swiglu.swiglu(x, x), torch.nn.functional.silu(x) * x)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def free(tensor, left=0):
    tensor.untyped_storage().resize_(left)
    return tensor


# Views of memory that can be taken away: a whole tensor, its end, every other column, and what no stride describes.
VIEWS = {
    "contiguous": lambda: torch.ones(8, 32),
    "the end": lambda: torch.ones(10, 32)[2:],
    "columns": lambda: torch.ones(8, 64)[:, ::2],
    "a left half": lambda: torch.ones(8, 64)[:, :32],
    "transposed": lambda: torch.ones(32, 8).t(),
    "4d": lambda: torch.ones(2, 3, 4, 8).permute(1, 0, 2, 3)[..., ::2],
}


@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("view", VIEWS)
def test_a_freed_storage_is_an_error_in_forward(view, operand):
    operands = [VIEWS[view]() for _ in range(3)]
    shape = re.escape(str(tuple(operands[0].shape)))
    free(operands[operand])
    with pytest.raises(RuntimeError, match=f"storage of a tensor of shape {shape} was freed"):
        cpu.swiglu_fwd(*operands, SILU)


@pytest.mark.parametrize("operand", range(5))
@pytest.mark.parametrize("view", VIEWS)
def test_a_freed_storage_is_an_error_in_backward(view, operand):
    operands = [VIEWS[view]() for _ in range(5)]
    free(operands[operand])
    with pytest.raises(RuntimeError, match="was freed"):
        cpu.swiglu_bwd(*operands, SILU)


@needs_dlpack
@pytest.mark.parametrize("operand", range(2))
@pytest.mark.parametrize("rows", (slice(None), slice(2, None)))
def test_a_freed_storage_is_an_error_of_a_packed_product(rows, operand):
    operands = [torch.ones(8, 64)[rows], torch.ones(8, 32)[rows]]
    free(operands[operand])
    with pytest.raises(RuntimeError, match="was freed"):
        _cpu_kernels.swiglu_packed_fwd(1, 1, None, *operands)


@pytest.mark.parametrize("view", ("columns", "a left half", "transposed", "4d"))
def test_a_storage_that_ends_too_early_is_an_error(view):
    gate, up, out = (VIEWS[view]() for _ in range(3))
    free(up, 40)
    with pytest.raises(RuntimeError, match=r"made smaller \(it has 40 bytes, and the tensor ends at \d+\)"):
        cpu.swiglu_fwd(gate, up, out, SILU)


def test_a_storage_that_ends_with_the_tensor_is_long_enough():
    gate, up, out = (torch.ones(8, 64)[:, :32] for _ in range(3))
    free(up, 4 * (7 * 64 + 32))
    cpu.swiglu_fwd(gate, up, out, SILU)
    free(up, 4 * (7 * 64 + 32) - 1)
    with pytest.raises(RuntimeError, match="has 1919 bytes, and the tensor ends at 1920"):
        cpu.swiglu_fwd(gate, up, out, SILU)


def test_tensors_without_elements_need_no_memory():
    empty = [free(torch.ones(0, 32)) for _ in range(3)]
    cpu.swiglu_fwd(*empty, SILU)
    cpu.swiglu_fwd(*(tensor[:, ::2] for tensor in empty), SILU)
