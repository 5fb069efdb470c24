"""Private names of PyTorch and transformers that the patcher uses, and what happens where one is missing.

A release that renames one costs a fast path or a feature, never the import.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def _private(module: str, path: str) -> Any:
    """The attribute at a dotted path below a module, or None. The module may not have been imported yet."""
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        return None
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


_storage_use_count: Callable[[int], int] | None = _private("torch", "_C._storage_Use_Count")
_tensor_use_count: Callable[[Tensor], int] | None = _private("torch", "Tensor._use_count")
_function_modes: Callable[[], int] | None = _private("torch", "_C._len_torch_function_stack")
_function_mode_at: Callable[[int], object] | None = _private("torch", "_C._get_function_stack_at")
_device_context: type | None = _private("torch.utils._device", "DeviceContext")
_dispatch_modes: Callable[[], int] | None = _private("torch", "_C._len_torch_dispatch_stack")
_mode_stack: Callable[[], list] | None = _private("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
_default_hooks: Callable[[bool], Any] | None = _private("torch", "_C._autograd._top_saved_tensors_default_hooks")
_hooks_enabled: Callable[[], bool] | None = _private("torch", "_C._autograd._saved_tensors_hooks_is_enabled")
_pop_hooks: Callable[[], None] | None = _private("torch", "_C._autograd._pop_saved_tensors_default_hooks")
_push_hooks: Callable[[Callable, Callable], None] | None = _private(
    "torch", "_C._autograd._push_saved_tensors_default_hooks"
)
_graph_task: Callable[[], int] | None = _private("torch", "_C._current_graph_task_id")
_keep_graph: Callable[[], bool] | None = _private("torch", "_C._autograd._get_current_graph_task_keep_graph")
_global_hooks: Callable[[], bool] | None = _private("torch.nn.modules.module", "_has_any_global_hook")

increment_version: Callable[[Tensor], None] | None = _private("torch.autograd.graph", "increment_version")

# As it is before any tool puts its own in its place: a call of a module runs its hooks and its forward, nothing else.
module_call: Callable[..., Any] = nn.Module.__call__


# Without these three names nothing is written over.
can_prove_ownership = None not in (_storage_use_count, _tensor_use_count, increment_version)


def use_counts(tensor: Tensor) -> tuple[int, int]:
    """(users of the tensor's storage, users of the tensor itself outside Python among them)"""
    assert _storage_use_count is not None and _tensor_use_count is not None
    storage = tensor.untyped_storage()
    # A storage that somebody holds as such is handed out as the same object once more.
    return _storage_use_count(storage._cdata) + sys.getrefcount(storage), _tensor_use_count(tensor)


# Dispatch modes of our own that change nothing of what they see.
passive_modes: set[type] = set()


def _is_passive(mode: object) -> bool:
    # PyTorch's counter of floating-point operations is one too.
    return type(mode) in passive_modes or type(mode).__module__ == "torch.utils.flop_counter"


def is_any_mode_active() -> bool:
    """Whether a dispatch or function mode sees what runs here, and might keep or change it.

    One that chooses a default device does not.
    """
    if _dispatch_modes is None or _function_modes is None:
        return True
    if _dispatch_modes() and (_mode_stack is None or not all(map(_is_passive, _mode_stack()))):
        return True
    count = _function_modes()
    if not count:
        return False
    if _function_mode_at is None or _device_context is None:
        return True
    return not all(type(_function_mode_at(at)) is _device_context for at in range(count))


def _unknown() -> bool:
    return True


# Whether hooks are registered for every module.
has_global_hook: Callable[[], bool] = _unknown if _global_hooks is None else _global_hooks


def global_hooks() -> list[Callable]:
    """The hooks that are registered for every module, as far as PyTorch says which."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    tables = [_private("torch.nn.modules.module", f"_global_{kind}_hooks") for kind in kinds]
    return [_unknown] if None in tables else [hook for table in tables for hook in table.values()]


def can_pack_saved_tensors() -> bool:
    """Whether saved-tensor hooks may be used here; without them the product is kept: see `patching.recompute`."""
    return not (_default_hooks is None or _graph_task is None or _hooks_enabled is None) and _hooks_enabled()


def saved_tensors_default_hooks() -> tuple[Callable, Callable] | None:
    """(pack, unpack) of the innermost `saved_tensors_hooks`, if there are any."""
    assert _default_hooks is not None
    return _default_hooks(True)


# Without these two names, keep=0 and keep=1 keep what keep=2 does.
can_step_outside_hooks = None not in (_pop_hooks, _push_hooks)


def pop_saved_tensors_hooks() -> None:
    """Take the innermost `saved_tensors_hooks` off."""
    assert _pop_hooks is not None
    _pop_hooks()


def push_saved_tensors_hooks(pack: Callable, unpack: Callable) -> None:
    """Put them on again."""
    assert _push_hooks is not None
    _push_hooks(pack, unpack)


def graph_task() -> int:
    """Which backward pass is running in this thread."""
    assert _graph_task is not None
    return _graph_task()


def keeps_graph() -> bool:
    """Whether the backward pass that is running may be followed by another one through the same graph."""
    return _keep_graph is None or _keep_graph()


def fusion_registry() -> tuple[dict[str, Any], type] | None:
    """(registry, base class of its entries) of transformers' `fusion_config`; None in releases without one."""
    registry = _private("transformers.fusion_mapping", "_FUSION_REGISTRY")
    base = _private("transformers.fusion_mapping", "ModuleFusionSpec")
    return None if registry is None or base is None else (registry, base)
