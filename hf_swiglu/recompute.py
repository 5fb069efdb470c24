"""Two buffers for backward, not three: the down projection's saved input is recomputed from gate and up.

The product saves gate and up. The projection after it would save the product as well; while it runs, autograd is told
to pack that tensor as "ask the product's node". Any module can stand there: what else it saves is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_swiglu import autograd


def child_of(module: nn.Module, name: str) -> nn.Module:
    """The child called `name`, which may be a path; `nn.Module.__getattr__` takes ten times as long."""
    child = module._modules.get(name)
    return module.get_submodule(name) if child is None else child


def project(module: nn.Module, name: str, product: Tensor) -> Tensor:
    """`module.name(product)`, where the graph keeps no `product` if it can compute it again."""
    down = child_of(module, name)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return down(product)
    node = product.grad_fn
    if node is None or not autograd.can_recompute(node) or product.numel() == 0:
        return down(product)
    address, version, dtype = product.data_ptr(), product._version, product.dtype
    # Only the innermost hooks apply; what is none of ours goes to the next ones, gradient checkpointing's for instance.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def is_product(tensor: Tensor) -> bool:
        # A version that moved means that the module wrote into the product before it saved it.
        return tensor.data_ptr() == address and tensor.dtype == dtype and tensor._version == version

    def pack(tensor: Tensor):
        if is_traceable_wrapper_subclass(tensor):
            # A DTensor of tensor parallelism has the product inside.
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            tensors = [name for name, part in parts.items() if isinstance(part, Tensor)]
            if len(tensors) == 1 and is_product(parts[tensors[0]]):
                return _Rewrapped(parts | {tensors[0]: _Recomputed(node, parts[tensors[0]])}, tensor, context)
        elif is_product(tensor):
            return _Recomputed(node, tensor)
        return tensor if outer is None else outer[0](tensor)

    def unpack(packed):
        if isinstance(packed, (_Recomputed, _Rewrapped)):
            return packed.tensor()
        return packed if outer is None else outer[1](packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return down(product)


class _Recomputed:
    """A view of the product, as its node can compute it again.

    Holding the node, not gate and up themselves, leaves them to whatever packed them: gradient checkpointing drops
    them after forward, `save_on_cpu` moves them away.
    """

    def __init__(self, node, tensor: Tensor):
        self._node, self._size, self._stride = node, tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        with torch.no_grad():
            return autograd.recompute(self._node).as_strided(self._size, self._stride)


class _Rewrapped:
    """A tensor subclass around a view of the product; `parts` are what `__tensor_flatten__` names."""

    def __init__(self, parts: dict[str, Any], wrapper: Tensor, context: object):
        self._parts, self._class, self._context = parts, type(wrapper), context
        self._size, self._stride = wrapper.size(), wrapper.stride()

    def tensor(self) -> Tensor:
        parts = {name: part.tensor() if isinstance(part, _Recomputed) else part for name, part in self._parts.items()}
        return self._class.__tensor_unflatten__(parts, self._context, self._size, self._stride)  # type: ignore[attr-defined]
