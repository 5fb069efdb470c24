"""Private names of PyTorch, transformers and accelerate, and what is disabled where one is missing.

Where a release renames one, a fast path or a feature is disabled, and the import still succeeds: `missing` lists them,
and `hf-swiglu doctor` prints the list. No other file of the package reads a private name of another library.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Every name that was looked up, with what is disabled where it is missing.
NAMES: dict[str, str] = {}
missing: dict[str, str] = {}

_KERNELS = "every kernel: function transforms cannot be detected"
_DIRECT = "launches without PyTorch's dispatcher: dispatch modes and profilers cannot be detected"
_OVERWRITE = "writing a product over its gate: sole ownership of memory cannot be proved"
_KEEP = "keep=0, keep=1 and tiles in training: two buffers are kept"
_RECOMPUTE = "computing the product again in backward: three buffers are kept, not two"


def _private(module: str, path: str, without: str) -> Any:
    """The attribute at a dotted path below a module, or None. The module may not have been imported yet."""
    NAMES[f"{module}.{path}"] = without
    try:
        owner: Any = importlib.import_module(module)
        found = functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)
    except ImportError:
        found = None
    if found is None:
        missing[f"{module}.{path}"] = without
    return found


# Interception of a call before its kernel: see `torch_modes`.
_interpreters: Callable[[], object] | None = _private("torch", "_C._functorch.peek_interpreter_stack", _KERNELS)
_dual_level: int | None = _private("torch.autograd", "forward_ad._current_level", _KERNELS)
_is_tracing: Callable[[], bool] | None = _private("torch", "_C._is_tracing", "nothing: torch.jit.is_tracing is called")
_is_batched: Callable[[Tensor], bool] | None = _private(
    "torch", "_C._functorch.is_legacy_batchedtensor", "the backward kernel: PyTorch differentiates the plain formula"
)
_profiles: Callable[[], bool] | None = _private("torch.autograd", "_profiler_enabled", _DIRECT)
_dispatch_modes: Callable[[], int] | None = _private("torch", "_C._len_torch_dispatch_stack", _DIRECT)
_mode_stack: Callable[[], list] | None = _private(
    "torch.utils._python_dispatch", "_get_current_dispatch_mode_stack", f"under a passive mode, {_OVERWRITE}"
)
_function_modes: Callable[[], int] | None = _private("torch", "_C._len_torch_function_stack", _OVERWRITE)
_function_mode_at: Callable[[int], object] | None = _private(
    "torch", "_C._get_function_stack_at", f"under a default device, {_OVERWRITE}"
)
_device_context: type | None = _private("torch.utils._device", "DeviceContext", f"under a default device, {_OVERWRITE}")

# Reference counts of a tensor's memory: see `patching.rewriting.ownership`.
_storage_use_count: Callable[[int], int] | None = _private("torch", "_C._storage_Use_Count", _OVERWRITE)
_tensor_use_count: Callable[[Tensor], int] | None = _private("torch", "Tensor._use_count", _OVERWRITE)
increment_version: Callable[[Tensor], None] | None = _private("torch.autograd.graph", "increment_version", _OVERWRITE)
_keep_graph: Callable[[], bool] | None = _private(
    "torch", "_C._autograd._get_current_graph_task_keep_graph", "writing gradients over gate and up in backward"
)

# What the graph saves: see `patching.memory.recompute`.
_default_hooks: Callable[[bool], Any] | None = _private(
    "torch", "_C._autograd._top_saved_tensors_default_hooks", _RECOMPUTE
)
_hooks_enabled: Callable[[], bool] | None = _private(
    "torch", "_C._autograd._saved_tensors_hooks_is_enabled", _RECOMPUTE
)
_pop_hooks: Callable[[], None] | None = _private("torch", "_C._autograd._pop_saved_tensors_default_hooks", _KEEP)
_push_hooks: Callable[[Callable, Callable], None] | None = _private(
    "torch", "_C._autograd._push_saved_tensors_default_hooks", _KEEP
)
_graph_task: Callable[[], int] | None = _private("torch", "_C._current_graph_task_id", _RECOMPUTE)
_node_class: type | None = _private("torch.autograd", "Function._backward_cls", _RECOMPUTE)
_is_wrapper: Callable[[Tensor], bool] | None = _private(
    "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", f"under tensor parallelism, {_RECOMPUTE}"
)
_global_hooks: Callable[[], bool] | None = _private(
    "torch.nn.modules.module", "_has_any_global_hook", "fused products: hooks of all modules cannot be detected"
)

_global_tables: list[dict | None] = [
    _private(
        "torch.nn.modules.module",
        f"_global_{kind}_hooks",
        f"while any hook is registered for all modules, {_RECOMPUTE}",
    )
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]

# In older releases, 2.8 for one, Dynamo takes `torch.compiler.is_exporting()` for true in all that it compiles.
_exporting: bool | None = _private(
    "torch.compiler",
    "_is_exporting_flag",
    "under torch.compile in older releases, keep and tile: three buffers are kept",
)

# With it the C extension reads tensors directly; without it `backends.cpu` reads their addresses in Python.
exchange_api: object | None = _private(
    "torch", "Tensor.__dlpack_c_exchange_api__", "kernels that read contiguous tensors in C: 2 us more for each call"
)

# PyTorch's own call of a module, read before another library can replace it: it runs the hooks and the forward only.
module_call: Callable[..., Any] = nn.Module.__call__

# The dictionaries of a module's hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_state = vars(nn.Module())
for _hook in HOOKS:
    NAMES[f"torch.nn.Module().{_hook}"] = "fused products: hooks of activations cannot be detected"
    if _hook not in _state:
        missing[f"torch.nn.Module().{_hook}"] = NAMES[f"torch.nn.Module().{_hook}"]
knows_hooks = all(hook in _state for hook in HOOKS)

# The attributes in which accelerate stores a module's own forward, and its hook.
ACCELERATE_FORWARD, ACCELERATE_HOOK = "_old_forward", "_hf_hook"

# Without these three names no tensor is written over.
can_prove_ownership = None not in (_storage_use_count, _tensor_use_count, increment_version)


def _unknown() -> bool:
    return True


def _unknown_count() -> int:
    return 1


# Each of these returns True where the private name is missing.
def _is_transform_active() -> bool:
    """Whether vmap, grad or jvp wrap tensors here, or attach tangents."""
    return _interpreters() is not None or forward_ad._current_level >= 0  # type: ignore[misc]


is_transform_active = _unknown if _interpreters is None or _dual_level is None else _is_transform_active

is_tracing: Callable[[], bool] = _is_tracing or torch.jit.is_tracing
is_profiling: Callable[[], bool] = _profiles or _unknown
count_dispatch_modes: Callable[[], int] = _dispatch_modes or _unknown_count
has_global_hook: Callable[[], bool] = _global_hooks or _unknown


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether `autograd.grad(..., is_grads_batched=True)` has made a batch of gradients look like one."""
    return _is_batched is None or _is_batched(tensor)


def _read_exporting_flag() -> bool:
    return torch.compiler._is_exporting_flag


# Whether torch.export captures: an exported program has no backward of its own.
is_exporting: Callable[[], bool] = torch.compiler.is_exporting if _exporting is None else _read_exporting_flag


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether the tensor is a subclass, such as DTensor, that names the tensors it consists of."""
    return _is_wrapper is not None and _is_wrapper(tensor)


def use_counts(tensor: Tensor) -> tuple[int, int]:
    """(references to the tensor's storage, references to the tensor, those from C++ included)"""
    assert _storage_use_count is not None and _tensor_use_count is not None
    storage = tensor.untyped_storage()
    # `untyped_storage` returns the storage object that Python code already holds, which then has more references.
    return _storage_use_count(storage._cdata) + sys.getrefcount(storage), _tensor_use_count(tensor)


# Dispatch modes of this package that neither keep nor change the tensors that they observe.
passive_modes: set[type] = set()


def _is_passive(mode: object) -> bool:
    # PyTorch's counter of floating-point operations is passive as well.
    return type(mode) in passive_modes or type(mode).__module__ == "torch.utils.flop_counter"


def is_any_mode_active() -> bool:
    """Whether a dispatch or function mode is active that might keep or change the operators' tensors.

    The mode that sets a default device does neither.
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


def global_hooks() -> list[Callable]:
    """The hooks that are registered for every module; an untrusted stand-in where PyTorch does not list them."""
    if None in _global_tables:
        return [_unknown]
    return [hook for table in _global_tables if table is not None for hook in table.values()]


def can_pack_saved_tensors() -> bool:
    """Whether saved-tensor hooks may be used here; without them `patching.memory.recompute` keeps the product."""
    return not (_default_hooks is None or _graph_task is None or _hooks_enabled is None) and _hooks_enabled()


def saved_tensors_default_hooks() -> tuple[Callable, Callable] | None:
    """(pack, unpack) of the innermost `saved_tensors_hooks`, if there are any."""
    assert _default_hooks is not None
    return _default_hooks(True)


# Without these two names, keep=0 and keep=1 behave as keep=2.
can_suspend_hooks = None not in (_pop_hooks, _push_hooks)


def pop_saved_tensors_hooks() -> None:
    """Remove the innermost `saved_tensors_hooks`."""
    assert _pop_hooks is not None
    _pop_hooks()


def push_saved_tensors_hooks(pack: Callable, unpack: Callable) -> None:
    """Make these the innermost `saved_tensors_hooks` again."""
    assert _push_hooks is not None
    _push_hooks(pack, unpack)


def graph_task() -> int:
    """The id of the backward pass that is running in this thread."""
    assert _graph_task is not None
    return _graph_task()


def node_classes(functions: Sequence[type[torch.autograd.Function]]) -> tuple[type, ...]:
    """The classes of these functions' nodes in the graph; none where PyTorch does not expose them."""
    return () if _node_class is None else tuple(function._backward_cls for function in functions)  # type: ignore[attr-defined]


def keeps_graph() -> bool:
    """Whether the backward pass that is running may be followed by another one through the same graph."""
    return _keep_graph is None or _keep_graph()


def fusion_registry() -> tuple[dict[str, Any], type] | None:
    """(registry, base class of its entries) of transformers' `fusion_config`; None in releases without one."""
    registry = _private("transformers.fusion_mapping", "_FUSION_REGISTRY", "fusion_config")
    base = _private("transformers.fusion_mapping", "ModuleFusionSpec", "fusion_config")
    return None if registry is None or base is None else (registry, base)
