"""The operators as PyTorch knows them: schemas and fakes. PyTorch picks the backend by device key.

Both write into memory that the caller allocates, so one operator serves new outputs, outputs in place of the
gate, and the two halves of a packed gradient. Without `up` they compute the activation alone, which is how the
self-gated SwiGLU runs. `power` and `limits` are the fields of `reference.Gating`; `limits` is left out when all
five have their defaults, because passing six scalars costs 2.7 us of a 1.8 us call (torch 2.13, EPYC 7003).

Neither operator differentiates: `functional` puts an `autograd.Function` around them.
"""

import torch

library = torch.library.Library("hf_swiglu", "DEF")
library.define("product(Tensor gate, Tensor? up, Tensor(a!) out, int power=1, float[]? limits=None) -> ()")
library.define(
    "product_backward(Tensor grad, Tensor gate, Tensor? up, Tensor(a!) grad_gate, Tensor(b!)? grad_up,"
    " int power=1, float[]? limits=None) -> ()"
)

product = torch.ops.hf_swiglu.product.default
product_backward = torch.ops.hf_swiglu.product_backward.default

# Nothing to record here: without this, autograd's boxed fallback costs 5 us a call (torch 2.13, EPYC 7003).
for _name in ("product", "product_backward"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("hf_swiglu::product", lib=library)
def _(gate, up, out, power=1, limits=None):
    return None


@torch.library.register_fake("hf_swiglu::product_backward", lib=library)
def _(grad, gate, up, grad_gate, grad_up, power=1, limits=None):
    return None
