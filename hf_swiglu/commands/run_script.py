"""Runs a user's script and fuses every model that it builds, also in its threads and child processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hf_swiglu.patching.patch_on_load import patched_process, process_session


def run_script(target: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
    """Run a script, or a module with `module=True`, as `python` would.

    Raises:
        FileNotFoundError: there is no such script. Exceptions of the script itself are passed on.
    """
    if not module and not Path(target).is_file():
        raise FileNotFoundError(f"run_script: there is no script {target!r}; for a module, use -m")
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [target, *arguments]
    sys.path.insert(0, "" if module else str(Path(target).resolve().parent))
    try:
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path


@contextlib.contextmanager
def patched_processes(options: dict[str, Any]) -> Iterator[None]:
    """Fuse the models that this process builds, and those of functions that `multiprocessing` runs in child processes.

    Each process prints on standard error how many MLPs it has fused. A subclass of `Process` that overrides `run`, and
    programs that are started in other ways, are not patched.
    """
    start = BaseProcess.start

    def start_patched(self):
        target = getattr(self, "_target", None)
        if target is not None and not isinstance(target, _PatchedTarget):
            self._target = _PatchedTarget(target, options)
        start(self)

    BaseProcess.start = start_patched  # type: ignore[method-assign]
    try:
        with patched_process(options) as session:
            try:
                yield
            finally:
                _report("hf-swiglu", session.count)
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]


class _PatchedTarget:
    """The target function of a child process, which patches with these options before it calls it."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self.function, self.options = function, options

    def __call__(self, *args, **kwargs):
        # A forked child inherits the parent's session and its counts.
        inherited = process_session()
        before = inherited.count if inherited is not None else (0, 0)
        with contextlib.ExitStack() as stack:
            session = inherited or stack.enter_context(patched_process(self.options))
            try:
                return self.function(*args, **kwargs)
            finally:
                counts = tuple(now - then for now, then in zip(session.count, before))
                if counts != (0, 0):
                    _report(f"hf-swiglu in {multiprocessing.current_process().name}", counts)


def _report(who: str, counts: tuple[int, ...]) -> None:
    names = [f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in zip(counts, ("MLP", "model"))]
    why = "; `hf-swiglu inspect MODEL` says why" if counts[1] and not counts[0] else ""
    print(f"{who}: {names[0]} fused in {names[1]}{why}", file=sys.stderr)
