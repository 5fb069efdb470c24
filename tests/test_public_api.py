"""The public names, their documentation, and what `import hf_swiglu` does to a process."""

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from support.kernel import HAS_KERNEL, NO_KERNEL

import hf_swiglu

PUBLIC = [
    "PatchReport",
    "SwiGLU",
    "__version__",
    "available_backends",
    "patch_model",
    "patch_on_load",
    "register",
    "swiglu",
    "swiglu_packed",
    "unpatch_model",
    "unregister",
]
CALLABLES = [name for name in PUBLIC if not name.startswith("__")]
PACKAGE = Path(hf_swiglu.__file__).parent
# By what they hold: to import some of them takes Triton.
DOCUMENTED = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


def test_public_names_are_pinned():
    assert sorted(hf_swiglu.__all__) == PUBLIC
    assert len(PUBLIC) <= 12
    assert all(hasattr(hf_swiglu, name) for name in PUBLIC)


@pytest.mark.parametrize("name", CALLABLES)
def test_public_names_are_documented(name):
    text = inspect.getdoc(getattr(hf_swiglu, name))
    assert text.splitlines()[0].endswith(".")
    assert "Example:" in text and ">>>" in text


def test_modules_have_examples():
    assert {"hf_swiglu.functional", "hf_swiglu.testing", "hf_swiglu.patching.patch_model"} <= set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name):
    if name == "hf_swiglu.testing" and not HAS_KERNEL:
        # Its examples count launches.
        pytest.skip(NO_KERNEL)
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, attempted = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert attempted > 0
    assert failed == 0


def in_a_fresh_process(code):
    """What `code` prints there, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


IMPORT = """
import sys
import torch
from transformers.activations import ACT2CLS, ACT2FN

def state():
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().tolist(),
        "hooks": (list(sys.meta_path), list(sys.path_hooks), sys.excepthook),
        "linear": torch.nn.Linear.forward,
        "silu": torch.nn.functional.silu,
    }

before, modules, tables = state(), set(sys.modules), [dict(dict.items(table)) for table in (ACT2FN, ACT2CLS)]
import hf_swiglu
assert state() == before
for table, entries in zip((ACT2FN, ACT2CLS), tables):
    assert dict(dict.items(table)) == entries | {"swiglu": hf_swiglu.SwiGLU}
assert not torch.cuda.is_initialized()
print(*sorted(set(sys.modules) - modules), sep="\\n")
"""


@pytest.fixture(scope="module")
def imported():
    """The modules that `import hf_swiglu` adds to a process with torch and transformers.activations."""
    return in_a_fresh_process(IMPORT)


@pytest.mark.slow
def test_import_loads_no_kernel(imported):
    kernels = {"triton", "hf_swiglu.backends.triton", "hf_swiglu.backends.cpu", "hf_swiglu.backends._cpu_kernels"}
    assert "hf_swiglu.functional" in imported
    assert not kernels & set(imported)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="torch.library loads modules of transformers",
)
def test_import_is_light(imported):
    """No more of the host library than the place where a fusion is announced: its modeling_utils alone takes 0.8 s."""
    known = {"hf_swiglu", *sys.stdlib_module_names}
    # The second takes 0.5 ms; torch 2.14 loads it when a default device is first set.
    light = {"transformers.fusion_mapping", "torch.utils._device"}
    assert {module for module in imported if module.partition(".")[0] not in known} <= light


FOREIGN = """
import warnings
from transformers.activations import ACT2CLS, ACT2FN
class Foreign: pass
ACT2FN["swiglu"] = ACT2CLS["swiglu"] = Foreign
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_swiglu
assert dict.get(ACT2FN, "swiglu") is Foreign
assert any("register(overwrite=True)" in str(warning.message) for warning in caught), caught
hf_swiglu.register(overwrite=True)
assert dict.get(ACT2FN, "swiglu") is hf_swiglu.SwiGLU
"""


@pytest.mark.slow
def test_a_foreign_swiglu_does_not_lock_the_package_out():
    """The advice "call hf_swiglu.register(overwrite=True)" must be possible to follow."""
    in_a_fresh_process(FOREIGN)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_every_device_has_a_backend_or_a_reason(device):
    reason = hf_swiglu.backends.unavailable(device)
    serving = [b.name for b in hf_swiglu.available_backends() if b.available and device in b.devices]
    assert bool(serving) == (reason is None)
    assert serving or len(reason) > 10
