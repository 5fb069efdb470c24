"""Two buffers for backward, not three: the down projection's saved input is recomputed from gate and up.

The product saves gate and up. The projection after it would save the product as well; while it runs, autograd is told
to pack that tensor as "ask the product's node". Any module can stand there: what else it saves is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_swiglu import functional


def child_of(module: nn.Module, name: str) -> nn.Module:
    """The child called `name`, which may be a path; `nn.Module.__getattr__` takes ten times as long."""
    child = module._modules.get(name)
    return module.get_submodule(name) if child is None else child


def project(module: nn.Module, name: str, product: Tensor) -> Tensor:
    """`module.name(product)`, where the graph keeps no `product` if it can compute it again."""
    down = child_of(module, name)
    if torch.compiler.is_compiling():
        return down(product)
    node = product.grad_fn
    if node is None or not functional.can_recompute(node) or product.numel() == 0:
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
            if len(names) == 1 and is_product(getattr(tensor, names[0])):
                return _Rewrapped(_Recomputed(node, getattr(tensor, names[0])), tensor, names[0], context)
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
            return functional.recompute(self._node).as_strided(self._size, self._stride)


class _Rewrapped:
    """A tensor subclass around a view of the product."""

    def __init__(self, inner: _Recomputed, wrapper: Tensor, name: str, context: object):
        self._inner, self._class, self._name, self._context = inner, type(wrapper), name, context
        self._size, self._stride = wrapper.size(), wrapper.stride()

    def tensor(self) -> Tensor:
        inner = {self._name: self._inner.tensor()}
        return self._class.__tensor_unflatten__(inner, self._context, self._size, self._stride)  # type: ignore[attr-defined]
