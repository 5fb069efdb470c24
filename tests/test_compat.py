"""Each private name of `_compat`, hidden in turn: the import succeeds, and a patched model computes the same."""

import json
import os
import subprocess
import sys

import pytest

from hf_swiglu import _compat
from hf_swiglu.commands import cli, doctor

NAMES = list(_compat.NAMES)


@pytest.fixture(scope="module")
def errors():
    """By name, what went wrong without it."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "support.missing_names", *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_costs_no_more_than_a_fast_path(name, errors):
    assert errors[name] is None, errors[name]


def test_names_that_are_looked_up_late_are_listed():
    assert {"transformers.fusion_mapping._FUSION_REGISTRY", "torch.nn.Module()._forward_hooks"} <= set(NAMES)
    assert all(_compat.NAMES.values())


def test_the_doctor_prints_what_is_missing(capsys, monkeypatch):

    monkeypatch.setitem(_compat.missing, "torch._C.gone", "a fast path")
    assert doctor.diagnose().missing["torch._C.gone"] == "a fast path"
    assert cli.main(["doctor"]) == 0
    assert "without torch._C.gone: a fast path" in " ".join(capsys.readouterr().out.split())
