"""Installs a wheel or an sdist as a stranger would who has no compiler, and runs it there: `make wheel`.

    python tools/check_wheel.py dist/*
    python tools/check_wheel.py --here          # the package that is installed beside this Python must run its kernel

Each file is installed into a new environment, with nothing on PATH but that environment. What the package depends on
is borrowed from the environment of the Python that runs this: its site-packages come last on the new one's path, as a
plain folder, so that an editable install of the package itself in there is not seen.

A wheel must run the C kernel and give the plain formula's bits; its extension must load in every Python from 3.10 on
that is installed here. An sdist must install all the same, say that plain PyTorch is used, and give the same bits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]

CHECK = """
import sys, torch, hf_swiglu
from pathlib import Path
from hf_swiglu.testing import counted_launches
from transformers import LlamaConfig, LlamaForCausalLM
expects_kernel = sys.argv[2] == "kernel"
assert Path(hf_swiglu.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()), hf_swiglu.__file__
cpu = hf_swiglu.available_backends()[0]
print(f"  hf_swiglu {hf_swiglu.__version__}, torch {torch.__version__}: {cpu.detail}")
assert cpu.available is expects_kernel
for dtype in (torch.bfloat16, torch.float16):
    gate, up = (torch.randn(64, 1000, dtype=dtype) * 4 for _ in range(2))
    plain = torch.nn.functional.silu(gate) * up
    assert torch.equal(hf_swiglu.swiglu(gate, up), plain), dtype
    if expects_kernel:
        with counted_launches() as launches:
            assert torch.equal(hf_swiglu.swiglu(gate, up), plain), dtype
        assert len(launches) == 1
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model, ids = LlamaForCausalLM(config).to(torch.bfloat16).eval(), torch.randint(0, 64, (2, 64))
before = model(ids).logits
assert len(hf_swiglu.patch_model(model).fused) == 2
assert torch.equal(model(ids).logits, before)
"""

# Without torch: the addresses are those of ctypes arrays. Arguments as in csrc/module.c.
LOAD = """
import ctypes, importlib.util, math, sys
spec = importlib.util.spec_from_file_location("_cpu_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
gate, up, out = ((ctypes.c_float * 1000)(*(each(i) for i in range(1000))) for each in
                 (lambda i: (i - 500) / 50, lambda i: i % 7 - 3.0, lambda i: math.nan))
kernels.swiglu_fwd_strided(1, 1, None, 0, 1, 1000, (1000, 1) * 3, *map(ctypes.addressof, (gate, up, out)))
worst = max(abs(o - g / (1 + math.exp(-g)) * u) for g, u, o in zip(gate, up, out))
assert worst < 1e-5, worst
print("  Python %d.%d loads the extension and runs it: %s" % (*sys.version_info[:2], kernels.cpu_capability()))
"""


def main() -> int:
    if sys.argv[1:] == ["--here"]:
        return subprocess.run([sys.executable, "-c", CHECK, sys.prefix, "kernel"]).returncode
    for name in sys.argv[1:]:
        file = Path(name).resolve()
        print(file.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if file.suffix == ".whl":
                assert "-cp310-abi3-" in file.name, "expected one wheel for every Python from 3.10 on"
                _load_everywhere(file, Path(folder))
            _check_installed(file, Path(folder).resolve() / "env")
    return 0


def _load_everywhere(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [each for each in archive.namelist() if "_cpu_kernels" in each]
        extension = archive.extract(member, folder)
    for python in filter(shutil.which, PYTHONS):
        # A stand-in on PATH may have no interpreter behind it.
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            subprocess.run([python, "-c", LOAD, extension], check=True)


def _check_installed(file: Path, env: Path) -> None:
    venv.create(env, with_pip=True)
    (packages,) = env.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    python = str(env / "bin" / "python")
    variables = {key: value for key, value in os.environ.items() if key not in ("CC", "PYTHONPATH")}
    variables["PATH"] = str(env / "bin")
    assert all(shutil.which(compiler, path=variables["PATH"]) is None for compiler in ("cc", "gcc", "clang"))

    def run(*arguments: str, check: bool = True) -> int:
        return subprocess.run([python, *arguments], env=variables, cwd=env, check=check).returncode

    assert run("-c", "import importlib.util as u, sys; sys.exit(u.find_spec('hf_swiglu') is not None)") == 0
    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed", str(file))
    run("-c", CHECK, str(env), "kernel" if file.suffix == ".whl" else "plain")


if __name__ == "__main__":
    sys.exit(main())
