"""Run as a program: imports and uses hf_swiglu without one private name at a time, each in a child process.

Prints a JSON object: each name with the error that its child ended with, or with null.
"""

import builtins
import functools
import importlib
import importlib.machinery
import json
import os
import signal
import sys
import traceback

# Imported once, for all children; nothing is computed here, because threads of OpenMP do not survive a fork.
import torch

for module in ("accelerate", "transformers.models.llama.modeling_llama"):
    importlib.import_module(module)

SECONDS = 120


class WithoutOneName(importlib.machinery.PathFinder):
    """Finds `hf_swiglu._compat` so that its `getattr` and `vars` do not find `name`; all other code still does."""

    name: str

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != "hf_swiglu._compat":
            return None
        spec = super().find_spec(fullname, path, target)
        execute = spec.loader.exec_module

        def execute_without(module):
            module.getattr, module.vars = cls.getattr, cls.vars
            execute(module)

        spec.loader.exec_module = execute_without
        return spec

    @classmethod
    def getattr(cls, owner, name, *default):
        hidden_owner, _, hidden = cls.name.rpartition(".")
        if name == hidden and owner is resolved(hidden_owner):
            return default[0]
        return builtins.getattr(owner, name, *default)

    @classmethod
    def vars(cls, owner):
        hidden = cls.name.rpartition(".")[2]
        return {name: value for name, value in builtins.vars(owner).items() if name != hidden}


def resolved(path):
    """The module or class at a dotted path; None where there is none."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return functools.reduce(lambda owner, name: builtins.getattr(owner, name, None), parts[count:], owner)
    return None


def use_package_without(name):
    WithoutOneName.name = name
    sys.meta_path.insert(0, WithoutOneName)
    import hf_swiglu
    from hf_swiglu import _compat
    from hf_swiglu.commands.doctor import diagnose
    from support.models import tiny_llama, tokens
    from support.outcome import outcome

    assert _compat.missing[name] == _compat.NAMES[name]
    assert diagnose().missing[name] == _compat.NAMES[name]
    model = tiny_llama()

    def scored_and_trained():
        scored = outcome(model, input_ids=tokens(), differentiated=False)
        return scored, outcome(model, input_ids=tokens(), labels=tokens())

    expected = scored_and_trained()
    report = hf_swiglu.patch_model(model, strict=False)
    assert len(report.fused) == 2 or "fused products" in _compat.NAMES[name], report
    torch.testing.assert_close(scored_and_trained(), expected)


def run(name):
    """The error of a child that uses the package without `name`, or None."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # By a signal that nothing handles: a child that hangs ends.
        signal.alarm(SECONDS)
        status = 1
        try:
            use_package_without(name)
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        error = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return None if status == 0 else error or f"ended with status {status}"


if __name__ == "__main__":
    print(json.dumps({name: run(name) for name in sys.argv[1:]}))
