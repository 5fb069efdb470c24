"""Fusing transformers models as they are built, by their classes' constructors, and again at their first call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import transformers
from torch import nn
from torch.compiler import is_dynamo_compiling

from hf_swiglu.patching.memory.settings import checked
from hf_swiglu.patching.patch_model import patch_model
from hf_swiglu.patching.report import ALREADY_FUSED, FUSED, PatchReport
from hf_swiglu.patching.verify import compare_fused

_OPTIONS = {"activation": None, "keep": None, "tile": None, "strict": True, "verify": False, "only": None}


class Session:
    """The options of one `with patch_on_load(...)`, the models that were built in it, and their reports."""

    def __init__(self, options: dict[str, Any]):
        self._options = _OPTIONS | options
        checked(self._options["keep"], self._options["tile"])
        self._building = threading.local()
        # For each model that was built: the index of its report in `reports`.
        self._models: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        # For each transformers model: the outermost model that contains it.
        self._outermost: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._lock = threading.RLock()
        self.reports: list[PatchReport] = []

    @property
    def count(self) -> tuple[int, int]:
        """(MLPs fused, models)"""
        return sum(len(report.fused) for report in self.reports), len(self.reports)

    @contextlib.contextmanager
    def construction(self, model: nn.Module) -> Iterator[None]:
        """Entered around each `__init__` of a transformers model, those of its base classes included."""
        stack = vars(self._building).setdefault("stack", [])
        if any(model is other for other in stack):
            yield
            return
        stack.append(model)
        try:
            yield
        finally:
            stack.pop()
        if not stack:
            # Only the outermost constructor leaves the final module names and config.
            self.patch(model)

    def before_call(self, model: nn.Module) -> None:
        """Called before each call of a transformers model: modules may have been added since it was built."""
        if model in self._called:
            return
        outermost = self._outermost[model]() if model in self._outermost else model
        self.patch(model if outermost is None else outermost)
        self._called.update(part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))

    def patch(self, model: nn.Module) -> None:
        """Patch the model in its present state, and add or update its report."""
        with self._lock, _switched_off():
            report = patch_model(model, **self._options | {"strict": False, "verify": False})
            for part in model.modules():
                if isinstance(part, transformers.PreTrainedModel):
                    self._outermost[part] = weakref.ref(model)
            if model in self._models:
                at = self._models[model]
                self.reports[at] = _merged(self.reports[at], report)
            else:
                self._models[model] = len(self.reports)
                self.reports.append(report)

    def finish(self) -> None:
        """Patch every model once more, then apply `verify` and `strict`."""
        for model in list(self._models):
            self.patch(model)
        if self._options["verify"]:
            for model in list(self._models):
                compare_fused(model)
        if self._options["strict"] and not any(
            report.fused or report.already_fused or report.memory_only for report in self.reports
        ):
            elsewhere = "other threads and processes need a patch_on_load of their own, or hf-swiglu run"
            details = "\n".join(map(str, self.reports)) or f"no transformers model was built here; {elsewhere}"
            raise ValueError(f"patch_on_load: nothing was fused: {details}\nPass strict=False to accept that")


def _merged(before: PatchReport, now: PatchReport) -> PatchReport:
    """`now`, with the verdict `fused` for modules that this session fused before."""
    fused = {entry.name for entry in before.fused}
    return PatchReport(
        [
            dataclasses.replace(entry, verdict=FUSED)
            if entry.verdict == ALREADY_FUSED and entry.name in fused
            else entry
            for entry in now
        ]
    )


# Per context: in another thread or asyncio task it is None, and the session of the whole process applies, if any.
_session: ContextVar[Session | None] = ContextVar("hf_swiglu_session", default=None)
_process_session: Session | None = None
_is_off: ContextVar[bool] = ContextVar("hf_swiglu_session_is_off", default=False)

_lock = threading.Lock()
_users = 0
# The attributes that `_install` has replaced: (class, name, the class's own value, or None where it inherited it).
_replaced: list[tuple[type, str, Any]] = []


@contextlib.contextmanager
def patch_on_load(**options) -> Iterator[list[PatchReport]]:
    """Fuse every transformers model that is built inside: `from_pretrained`, `from_config` or a constructor.

    Remote code, `device_map`, quantisation and PEFT's `from_pretrained` are included: a model is patched when its
    constructor returns, before weights are loaded into it, and again when it is first called and when the context
    ends. Only this context is affected, not other threads or processes; nested contexts use their own options; the
    hooks into transformers are removed at the end, also after an error. `hf-swiglu run` patches a whole process.

    Args:
        **options: those of `patch_model`. `strict` and `verify` apply when the context ends.

    Yields:
        The list of reports, one for each model, which fills as models are built.

    Raises:
        TypeError: an unknown option.
        ValueError: nothing is fused by the end (with `strict`), an invalid `keep` or `tile`, or a swap that a config
            cannot express.

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
    session = Session(options)
    with _installed():
        token = _session.set(session)
        try:
            yield session.reports
            session.finish()
        finally:
            _session.reset(token)


@contextlib.contextmanager
def patched_process(options: dict[str, Any]) -> Iterator[Session]:
    """`patch_on_load` for every thread of this process, without its checks at the end."""
    global _process_session
    session, before = Session(options), _process_session
    with _installed():
        _process_session = session
        try:
            yield session
        finally:
            _process_session = before


def process_session() -> Session | None:
    """The session of `patched_process`, if this process is in one."""
    return _process_session


@contextlib.contextmanager
def _switched_off() -> Iterator[None]:
    """Inside, no session applies: a swap builds models for comparison, which are not to be patched."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def _current() -> Session | None:
    return None if _is_off.get() else _session.get() or _process_session


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Inside, constructors and calls of transformers models notify the current session."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _install()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for cls, name, original in reversed(_replaced):
                    delattr(cls, name) if original is None else setattr(cls, name, original)
                _replaced.clear()


def _install() -> None:
    """Wrap the `__init__` of every class: only the outermost one returns when the model is complete."""
    base = transformers.PreTrainedModel
    call, init_subclass = base.__call__, base.__init_subclass__.__func__  # type: ignore[attr-defined]

    def __call__(self, *args, **kwargs):
        if not is_dynamo_compiling() and (session := _current()) is not None:
            session.before_call(self)
        return call(self, *args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        init_subclass(cls, **kwargs)
        _wrap_constructor(cls)

    _replace(base, "__call__", functools.wraps(call)(__call__))
    _replace(base, "__init_subclass__", classmethod(functools.wraps(init_subclass)(__init_subclass__)))
    pending = [base]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        _wrap_constructor(cls)


def _wrap_constructor(cls: type[nn.Module]) -> None:
    init = vars(cls).get("__init__")
    if init is None or any(cls is seen and name == "__init__" for seen, name, _ in _replaced):
        return

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        session = _current()
        with contextlib.nullcontext() if session is None else session.construction(self):
            init(self, *args, **kwargs)

    _replace(cls, "__init__", __init__)


def _replace(cls: type, name: str, new: Any) -> None:
    _replaced.append((cls, name, vars(cls).get(name)))
    setattr(cls, name, new)
