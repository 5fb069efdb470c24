"""Fusing transformers models as they are built, by classes' constructors; what that missed, at their first call."""

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

from hf_swiglu.patching.changes import Change, Changes, call_all, entry, variable
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

# Reentrant: while a thread holds it, the garbage collector may end a use that was abandoned in the same thread.
_lock = threading.RLock()
# The uses of the hooks into transformers that have not ended: the first installs them, the last removes them.
_uses: list[_Use] = []
# The attributes that are replaced meanwhile: (class, name, the class's own value, or None where it inherited it).
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
    use = _Use([variable(_session, session)])
    with use, use:
        yield session.reports
        session.finish()


@contextlib.contextmanager
def patched_process(options: dict[str, Any]) -> Iterator[Session]:
    """`patch_on_load` for every thread of this process, without its checks at the end."""
    session = Session(options)
    use = _Use([entry(globals(), "_process_session", session)])
    with use, use:
        yield session


def process_session() -> Session | None:
    """The session of `patched_process`, if this process is in one."""
    return _process_session


@contextlib.contextmanager
def _switched_off() -> Iterator[None]:
    """Inside, no session applies: a swap builds models for comparison, which are not to be patched."""
    changes = Changes(temporary=True)
    with changes, changes:
        changes.make([variable(_is_off, True)])
        yield


def _current() -> Session | None:
    return None if _is_off.get() else _session.get() or _process_session


class _Use:
    """Inside, constructors and calls of transformers models notify the current session, which `changes` set.

    Beginning and ending are one call each. Entered twice, the outer `with` ends the use where an interrupt has stopped
    the inner one.
    """

    def __init__(self, changes: list[Change]):
        self._changes = changes

    def __enter__(self) -> None:
        with _lock:
            if self in _uses:
                # The second time, when an interrupt ends the use.
                _settle()
            else:
                hooks = [] if _uses else _hooks()
                call_all([*hooks, *(change.do for change in self._changes), functools.partial(_uses.append, self)])

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self in _uses:
                removed = _removal() if _uses == [self] else []
                ended = [change.undo for change in self._changes]
                call_all([*ended, *removed, functools.partial(_uses.remove, self)])
            _settle()


def _settle() -> None:
    """Install or remove the hooks where the garbage collector has ended another use after they were looked at."""
    if _uses and not _replaced:
        call_all(_hooks())
    elif _replaced and not _uses:
        call_all(_removal())


def _removal() -> list[functools.partial]:
    """The calls that remove the hooks. No session is left, also where uses have ended in another order."""
    originals = [_original(*each) for each in reversed(_replaced)]
    return [*originals, functools.partial(_replaced.clear), functools.partial(_session.set, None)]


def _original(cls: type, name: str, value: Any) -> functools.partial:
    """The call that gives a class its own value back."""
    if value is None:
        return functools.partial(type.__delattr__, cls, name)
    return functools.partial(type.__setattr__, cls, name, value)


def _hooks() -> list[functools.partial]:
    """The calls that wrap the `__init__` of every class: only the outermost one returns when the model is complete."""
    base = transformers.PreTrainedModel
    call, init_subclass = base.__call__, base.__init_subclass__.__func__  # type: ignore[attr-defined]

    def __call__(self, *args, **kwargs):
        if not is_dynamo_compiling() and (session := _current()) is not None:
            session.before_call(self)
        return call(self, *args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        init_subclass(cls, **kwargs)
        call_all(_wrapped_constructor(cls))

    calls = _replacement(base, "__call__", functools.wraps(call)(__call__))
    calls += _replacement(base, "__init_subclass__", classmethod(functools.wraps(init_subclass)(__init_subclass__)))
    seen: set[type] = set()
    pending = [base]
    while pending:
        cls = pending.pop()
        if cls not in seen:
            seen.add(cls)
            pending += cls.__subclasses__()
            calls += _wrapped_constructor(cls)
    return calls


def _wrapped_constructor(cls: type[nn.Module]) -> list[functools.partial]:
    init = vars(cls).get("__init__")
    if init is None:
        return []

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        session = _current()
        with contextlib.nullcontext() if session is None else session.construction(self):
            init(self, *args, **kwargs)

    return _replacement(cls, "__init__", __init__)


def _replacement(cls: type, name: str, new: Any) -> list[functools.partial]:
    """The calls that record a class's own value, and replace it."""
    record = functools.partial(_replaced.append, (cls, name, vars(cls).get(name)))
    return [record, functools.partial(type.__setattr__, cls, name, new)]
