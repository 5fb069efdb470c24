"""Installs from source without a compiler, OpenMP or Triton: each succeeds, computes, and says what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_wheel import CHECK

setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.long,
    # As [build-system] requires of it.
    pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="setuptools is older than 77"),
]


def run(*command, cwd=ROOT, **variables):
    """What a process prints, in an environment with these variables; an empty one is unset."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(folder, compiler):
    """(folder of the package as installed there, what the build printed)"""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_swiglu", source / "hf_swiglu", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source))
    return site, run(*command, CC=str(compiler), LDSHARED=f"{compiler} -shared", CFLAGS="", PYTHONPATH="")


def compiler_that(folder, rejects):
    """The system's compiler, which fails where its arguments match a pattern of the shell."""
    if COMPILER is None:
        pytest.skip("no C compiler is installed")
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in {rejects}) exit 1;; esac\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    return script


def check(site, expected):
    """The installed package launches the kernel or not, with eager's bits; returns what its doctor says."""
    variables = {"PYTHONPATH": str(site), "COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    # In that folder: Python looks in the working one first.
    run(sys.executable, "-c", CHECK, str(site), expected, cwd=site, **variables)
    return " ".join(run(sys.executable, "-m", "hf_swiglu", "doctor", cwd=site, **variables).split())


@pytest.mark.parametrize("lacks", ["compiler", "sources"])
def test_without_a_working_compiler_plain_pytorch_runs(lacks, tmp_path):
    # In the second case the probe for OpenMP compiles.
    compiler = "/bin/false" if lacks == "compiler" else compiler_that(tmp_path, "*capabilities.c*")
    site, printed = install(tmp_path, compiler)
    assert 'building extension "hf_swiglu.backends._cpu_kernels" failed' in printed, printed
    assert not list(site.rglob("_cpu_kernels*"))
    said = check(site, "plain")
    assert "the C extension was not built" in said and "cpu pytorch pytorch pytorch pytorch" in said


def test_without_openmp_the_kernel_runs_in_one_thread(tmp_path):
    site, _ = install(tmp_path, compiler_that(tmp_path, "*-fopenmp*"))
    said = check(site, "kernel")
    assert "1 thread: the compiler had no OpenMP" in said and "cpu cpu cpu cpu pytorch" in said


# As in an environment without the package; its version is in metadata that stay.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from hf_swiglu import available_backends, swiglu
from hf_swiglu.commands.cli import main
x = torch.randn(64, 1000, dtype=torch.bfloat16)
assert torch.equal(swiglu(x, x), torch.nn.functional.silu(x) * x)
assert not available_backends()[1].available
sys.exit(main(["doctor"]))
"""


def test_without_triton_the_other_backends_run():
    assert "Triton is not installed" in run(sys.executable, "-c", WITHOUT_TRITON, PYTHONPATH=str(ROOT), COLUMNS="200")
