"""Modes of PyTorch that see what runs inside them."""

from torch.utils._python_dispatch import TorchDispatchMode


class SeenOperators(TorchDispatchMode):
    """A dispatch mode, under which kernels run as the operators of this package; `names` lists those."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hf_swiglu":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))
