"""keep=2: the down projection's saved input is computed again from gate and up, unless hooks may see the difference.

The product's node saves gate and up. The projection after it would save the product as well; while it runs, a
saved-tensor hook packs that tensor as a recomputation by the product's node. The projection's other saved tensors are
unchanged. This is correct only if the projection does not write to the product: see `never_writes_input`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

from hf_swiglu import _compat, autograd
from hf_swiglu.patching.activations import defining_module, has_no_hooks
from hf_swiglu.patching.memory import dropout_projections

# Libraries whose projections read their input and never write to it, and whose hooks act on weights and devices only.
# Other code may write through `.data`, which autograd does not detect.
_TRUSTED = (
    "torch.nn.", "torch.ao.", "torch.distributed.", "transformers.", "peft.", "accelerate.", "deepspeed.",
    "bitsandbytes.", "torchao.", "optimum.", "torch.utils.module_tracker.",
)  # fmt: skip
_linear = F.linear


def project(down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """`down(product)`; the graph does not keep `product` if it can compute it again."""
    if not is_grad_enabled() or type(product) is not Tensor:
        return down(product)
    node = product.grad_fn
    if (
        node is None
        or not autograd.can_recompute(node)
        or product.numel() == 0
        or not isinstance(down, nn.Module)
        or not _compat.can_pack_saved_tensors()
        or _compat.is_any_mode_active()
        or not never_writes_input(down)
    ):
        return down(product)
    return call_with_packed(down, product, _NodeProduct(node))


class _NodeProduct:
    """A product that its node in the graph computes again."""

    def __init__(self, node):
        self._node = node
        # Only the innermost hooks apply: with none, the node's saved tensors can be read directly.
        self._holds_tensors = _compat.saved_tensors_default_hooks() is None

    def recomputation(self) -> Callable[[], Tensor]:
        """The function that computes the product for one saved tensor."""
        return autograd.recomputation(self._node, holds_tensors=self._holds_tensors)


def call_with_packed(down: nn.Module, product: Tensor, recomputable: Any) -> Tensor:
    """`down(product)`; the graph keeps `recomputable.recomputation()` in place of the product."""
    pack, unpack = _hooks(product, recomputable)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    # Twice, because an interrupt may come in the inner `finally`: hooks that stay would pack tensors of later calls.
    try:
        try:
            hooks.__enter__()
            return dropout_projections.call(down, product)
        finally:
            _end(hooks, pack)
    finally:
        _end(hooks, pack)


def _end(hooks: torch.autograd.graph.saved_tensors_hooks, pack: Callable) -> None:
    innermost = _compat.saved_tensors_default_hooks()
    if innermost is not None and innermost[0] is pack:
        hooks.__exit__()


def call(down: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """`down(product)`; the graph keeps the same tensors as in eager. The replacement of `project` for keep=3."""
    return down(product)


def never_writes_input(module: nn.Module) -> bool:
    """Whether a call of the module runs only code that is known not to write to its input."""
    if is_every_call_intercepted():
        return False
    # Most have no children, and `modules()` takes 2 us even then.
    return all(map(_is_trusted, module.modules() if module._modules else (module,)))


def is_every_call_intercepted() -> bool:
    """Whether third-party code intercepts the calls of every module, or of every linear one."""
    if F.linear is not _linear or nn.Module.__call__ is not _compat.module_call:
        return True
    return has_user_global_hook()


def has_user_global_hook() -> bool:
    """Whether every module's calls run a user-defined hook."""
    return _compat.has_global_hook() and not all(map(is_from_trusted_library, _compat.global_hooks()))


def _is_trusted(module: nn.Module) -> bool:
    state, cls = vars(module), type(module)
    # accelerate's wrapper of forward runs one or several hooks, which may be user-defined.
    hook = state.get(_compat.ACCELERATE_HOOK)
    if not all(
        map(is_from_trusted_library, (type(each) for each in (hook, *getattr(hook, "hooks", ())) if each is not None))
    ):
        return False
    if "forward" in state and not is_from_trusted_library(state["forward"]):
        return False
    if not is_from_trusted_library(cls.__call__) or not is_from_trusted_library(cls.forward):
        return False
    return has_no_hooks(state, is_from_trusted_library)


def is_from_trusted_library(code: Any) -> bool:
    """Whether a function, a method or a class is defined in one of the `_TRUSTED` libraries."""
    return defining_module(code).startswith(_TRUSTED)


def _hooks(product: Tensor, recomputable: Any) -> tuple[Callable, Callable]:
    address, version, dtype, shape = product.data_ptr(), product._version, product.dtype, product.shape
    # Only the innermost hooks apply; other tensors are passed to the next ones, such as gradient checkpointing's.
    outer = _compat.saved_tensors_default_hooks()

    def is_product(tensor: Tensor) -> bool:
        # A different version means that the module wrote into the product before it saved it.
        return tensor.data_ptr() == address and tensor.dtype == dtype and tensor._version == version

    def recomputed(tensor: Tensor) -> _Recomputed:
        return _Recomputed(recomputable.recomputation(), shape, dtype, tensor)

    def pack(tensor: Tensor):
        if _compat.is_wrapper_subclass(tensor):
            # A DTensor of tensor parallelism has the product inside.
            names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            parts = {name: getattr(tensor, name) for name in names}
            tensors = [name for name, part in parts.items() if isinstance(part, Tensor)]
            if len(tensors) == 1 and is_product(parts[tensors[0]]):
                return _Rewrapped(parts | {tensors[0]: recomputed(parts[tensors[0]])}, tensor, context)
        elif is_product(tensor):
            return recomputed(tensor)
        return tensor if outer is None else outer[0](tensor)

    def unpack(saved):
        if isinstance(saved, (_Recomputed, _Rewrapped)):
            return saved.tensor()
        return saved if outer is None else outer[1](saved)

    return pack, unpack


class _Recomputed:
    """A saved view of the product, with the function that computes the product again."""

    def __init__(self, compute: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, tensor: Tensor):
        self._compute, self._shape, self._dtype = compute, shape, dtype
        self._size, self._stride = tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        with torch.no_grad():
            product = self._compute()
        if product.shape != self._shape or product.dtype != self._dtype:
            raise RuntimeError(
                f"hf_swiglu: the product computed again for backward is {tuple(product.shape)} {product.dtype}, and "
                f"was {tuple(self._shape)} {self._dtype}; a saved-tensor hook has changed gate or up. Patch with "
                "keep=3 to keep the product instead"
            )
        return product.as_strided(self._size, self._stride)


class _Rewrapped:
    """A tensor subclass around a view of the product; `parts` are what `__tensor_flatten__` names."""

    def __init__(self, parts: dict[str, Any], wrapper: Tensor, context: object):
        self._parts, self._class, self._context = parts, type(wrapper), context
        self._size, self._stride = wrapper.size(), wrapper.stride()

    def tensor(self) -> Tensor:
        parts = {name: part.tensor() if isinstance(part, _Recomputed) else part for name, part in self._parts.items()}
        return self._class.__tensor_unflatten__(parts, self._context, self._size, self._stride)  # type: ignore[attr-defined]
