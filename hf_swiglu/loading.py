"""Fusing models while they are built, and running somebody else's script so."""

from __future__ import annotations

import contextlib
import runpy
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hf_swiglu import patching, verification
from hf_swiglu.report import PatchReport

_OPTIONS = {"activation": None, "recompute": True, "strict": True, "verify": False, "only": None}


class _Session:
    """One `with patch_on_load(...)`: its options, the models under construction, and what was patched."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.unfinished: list[weakref.ref[nn.Module]] = []
        self.models: list[weakref.ref[nn.Module]] = []
        self.reports: list[PatchReport] = []

    def begin(self, model: nn.Module) -> None:
        self.unfinished = [ref for ref in self.unfinished if ref() is not None]
        self.unfinished.append(weakref.ref(model))

    def end(self, model: nn.Module) -> None:
        """Patch the outermost model once it is complete: qualified names and configs are then what a user sees."""
        while self.unfinished and self.unfinished.pop()() is not model:
            pass
        if not any(ref() is not None for ref in self.unfinished):
            self.patch(model)

    def patch(self, model: nn.Module) -> None:
        # A swap builds a second model to compare with, which must not be patched in turn.
        token = _session.set(None)
        try:
            report = patching.patch_model(model, **self.options | {"strict": False, "verify": False})
        finally:
            _session.reset(token)
        self.models.append(weakref.ref(model))
        self.reports.append(report)

    def finish(self) -> None:
        for model in [model for ref in self.unfinished if (model := ref()) is not None]:
            # Built without `post_init`, as code from outside transformers may be.
            self.patch(model)
        if self.options["verify"]:
            for model in [model for ref in self.models if (model := ref()) is not None]:
                verification.compare_fused(model, patching.set_class)
        if self.options["strict"] and not any(report.fused or report.already_fused for report in self.reports):
            seen = "\n".join(map(str, self.reports)) or "no transformers model was built"
            raise ValueError(f"patch_on_load: nothing was fused: {seen}\nPass strict=False to accept that")


# Per context: another thread, and another asyncio task, sees None.
_session: ContextVar[_Session | None] = ContextVar("hf_swiglu_session", default=None)
_lock = threading.Lock()
_originals: dict[str, object] = {}
_users = 0


@contextlib.contextmanager
def patch_on_load(**options) -> Iterator[list[PatchReport]]:
    """Fuse every transformers model that is built inside: `from_pretrained`, `from_config` or a constructor.

    Remote code, `device_map`, quantisation and PEFT's `from_pretrained` are included: a model is patched when its
    construction ends, before weights are loaded into it. Only this context is affected, not other threads; nested
    contexts use their own options; nothing stays behind, whatever happens inside.

    Args:
        **options: those of `patch_model`. `strict` and `verify` are seen to when the context ends.

    Yields:
        The list of reports, one for each model, which fills as models are built.

    Raises:
        TypeError: an unknown option.
        ValueError: nothing is fused by the end (with `strict`), or a swap that a config cannot express.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_swiglu import patch_on_load
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> with patch_on_load() as reports:
        ...     model = LlamaForCausalLM(config)
        >>> len(reports[0].fused)
        2
    """
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(
            f"patch_on_load: unknown option {', '.join(sorted(unknown))}; the options are {', '.join(_OPTIONS)}"
        )
    session = _Session(_OPTIONS | options)
    _install()
    token = _session.set(session)
    try:
        yield session.reports
        session.finish()
    finally:
        _session.reset(token)
        _uninstall()


def run(target: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
    """Run a script, or a module with `module=True`, as `python` would.

    Raises:
        FileNotFoundError: there is no such script. Whatever the script raises comes through.
    """
    if not module and not Path(target).is_file():
        raise FileNotFoundError(f"run: there is no script {target!r}; for a module, use -m")
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


def _install() -> None:
    """Follow the construction of transformers models: from the base class's `__init__` to `post_init`."""
    global _users
    base = transformers.PreTrainedModel
    with _lock:
        _users += 1
        if _users > 1:
            return
        init, post_init = base.__init__, base.post_init
        _originals.update(__init__=init, post_init=post_init)

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if (session := _session.get()) is not None:
            session.begin(self)

    def watched_post_init(self):
        post_init(self)
        if (session := _session.get()) is not None:
            session.end(self)

    base.__init__ = watched_init  # type: ignore[method-assign]
    base.post_init = watched_post_init  # type: ignore[method-assign]


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for name, original in _originals.items():
                setattr(transformers.PreTrainedModel, name, original)
            _originals.clear()
