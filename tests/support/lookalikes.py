"""Forwards that resemble a gated MLP's, for `test_lookalikes`: a class for each, with what must become of it."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from support.models import HIDDEN, WIDE, GatedMLP

FUSED, SKIPPED = "fused", "skipped"
LOOKALIKES = {}


def lookalike(verdict, **attributes):
    """Collects a forward into a class of its own, with `attributes` set on each instance."""

    def collect(forward):
        def init(self):
            GatedMLP.__init__(self)
            for name, make in attributes.items():
                setattr(self, name, make() if callable(make) else copy.deepcopy(make))

        cls = type(forward.__name__, (GatedMLP,), {"__init__": init, "forward": forward})
        LOOKALIKES[forward.__name__] = (cls, verdict)
        return forward

    return collect


def norm():
    return nn.LayerNorm(WIDE)


def dropout():
    return nn.Dropout(0.5)


def packed():
    return nn.Linear(HIDDEN, 2 * WIDE)


@lookalike(FUSED)
def functional_silu(self, x):
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


@lookalike(FUSED)
def factors_swapped(self, x):
    return self.w2(torch.mul(self.w3(x), self.act(self.w1(x))))


@lookalike(FUSED, fc1=packed)
def packed_gate_first(self, x):
    gate, up = self.fc1(x).chunk(2, dim=-1)
    return self.w2(self.act(gate) * up)


@lookalike(FUSED, fc1=packed)
def packed_gate_last(self, x):
    up, gate = torch.chunk(self.fc1(x), 2, dim=-1)
    return self.w2(self.act(gate) * up)


@lookalike(FUSED, fc1=packed)
def packed_slices(self, x):
    both = self.fc1(x)
    return self.w2(self.act(both[..., :WIDE]) * both[..., WIDE:])


@lookalike(FUSED, fc1=packed)
def packed_interleaved(self, x):
    both = self.fc1(x)
    return self.w2(self.act(both[..., ::2]) * both[..., 1::2])


@lookalike(FUSED, fc1=packed)
def packed_along_tokens(self, x):
    gate, up = self.w1(x).chunk(2, dim=1)
    return self.w2(self.act(gate) * up)


@lookalike(FUSED)
def sigmoid_spelled_out(self, x):
    gate = self.w1(x)
    return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


@lookalike(FUSED, alpha=1.702)
def sigmoid_with_alpha(self, x):
    gate = self.w1(x)
    return self.w2(gate * torch.sigmoid(gate * self.alpha) * self.w3(x))


@lookalike(FUSED, limit=0.2)
def clamped(self, x):
    gate, up = self.w1(x).clamp(max=self.limit), self.w3(x).clamp(-self.limit, self.limit)
    return self.w2(self.act(gate) * up)


@lookalike(FUSED, limit=0.1)
def activation_clamped(self, x):
    return self.w2(self.act(self.w1(x)).clamp(max=self.limit) * self.w3(x))


@lookalike(FUSED)
def clamped_on_one_side(self, x):
    return self.w2(self.act(self.w1(x).clamp(min=-0.1)) * self.w3(x).clamp(max=0.1))


@lookalike(FUSED)
def up_plus_one(self, x):
    return self.w2(self.act(self.w1(x)) * (self.w3(x) + 1))


@lookalike(FUSED, norm=norm)
def normalised_product(self, x):
    return self.w2(self.norm(self.act(self.w1(x)) * self.w3(x)))


@lookalike(FUSED, norm=norm)
def normalised_gate(self, x):
    return self.w2(self.act(self.norm(self.w1(x))) * self.w3(x))


@lookalike(FUSED, scale=0.5)
def trailing_scale(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.scale


@lookalike(FUSED, scale=3)
def whole_number_scale(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.scale


@lookalike(FUSED)
def multipliers(self, x):
    return self.w2(self.w3(x) * self.act(self.w1(x) * 0.7)) * 1.3


@lookalike(FUSED)
def float32_inside(self, x):
    return self.w2((self.act(self.w1(x).float()) * self.w3(x)).type_as(x))


@lookalike(FUSED, drop=dropout)
def dropout_child(self, x):
    return self.drop(self.w2(self.drop(self.act(self.w1(x)) * self.w3(x))))


@lookalike(FUSED)
def functional_dropout(self, x):
    return self.w2(F.dropout(self.act(self.w1(x)) * self.w3(x), 0.5, self.training))


@lookalike(FUSED)
def dropout_always_on(self, x):
    return self.w2(F.dropout(self.act(self.w1(x)) * self.w3(x), 0.5))


@lookalike(FUSED, drop=dropout)
def dropout_by_a_childs_flag(self, x):
    return self.w2(F.dropout(self.act(self.w1(x)) * self.w3(x), 0.5, self.drop.training))


@lookalike(FUSED)
def sparse(self, x):
    gate = self.w1(x)
    cutoff = gate.mean(dim=-1, keepdim=True) + gate.std(dim=-1, keepdim=True)
    return self.w2(self.act(F.relu(gate - cutoff)) * self.w3(x))


@lookalike(FUSED)
def branches_on_training(self, x):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product * 2 if self.training else product)


@lookalike(FUSED, drop=dropout)
def branches_on_a_childs_training(self, x):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product * 2 if self.drop.training else product)


@lookalike(FUSED)
def branches_on_grad_mode(self, x):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product * 2 if torch.is_grad_enabled() else product)


@lookalike(FUSED)
def branches_on_a_missing_argument(self, x, scale=None):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product) if scale is None else self.w2(product * scale)


@lookalike(FUSED)
def branches_on_the_type(self, x):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product * 2 if isinstance(x, torch.Tensor) else product)


@lookalike(FUSED)
def stores_an_attribute(self, x):
    self.last = self.act(self.w1(x)) * self.w3(x)
    return self.w2(self.last)


def _count(self):
    self.calls = getattr(self, "calls", 0) + 1


@lookalike(FUSED)
def stores_an_attribute_in_a_helper(self, x):
    _count(self)
    return self.w2(self.act(self.w1(x)) * self.w3(x))


@lookalike(FUSED, seen=[])
def fills_a_list(self, x):
    gate = self.w1(x)
    self.seen.append(gate)
    return self.w2(self.act(gate) * self.w3(x))


@lookalike(FUSED)
def enters_a_context(self, x):
    with torch.no_grad():
        gate = self.w1(x)
    return self.w2(self.act(gate) * self.w3(x))


def _without_gradient(projection, x):
    with torch.no_grad():
        return projection(x)


@lookalike(FUSED)
def enters_a_context_in_a_helper(self, x):
    return self.w2(self.act(_without_gradient(self.w1, x)) * self.w3(x))


@lookalike(FUSED)
@torch.no_grad()
def decorated(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x))


@lookalike(FUSED)
def two_products(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x) + self.act(self.w3(x)) * self.w1(x))


@lookalike(FUSED)
def gate_used_again(self, x):
    gate = self.w1(x)
    return self.w2(self.act(gate) * self.w3(x) + gate)


@lookalike(SKIPPED)
def activation_used_again(self, x):
    activated = self.act(self.w1(x))
    return self.w2(activated * self.w3(x) + activated)


@lookalike(FUSED)
def product_used_again(self, x):
    product = self.act(self.w1(x)) * self.w3(x)
    return self.w2(product) + product[..., :HIDDEN]


@lookalike(FUSED)
def up_made_from_gate(self, x):
    gate = self.w1(x)
    return self.w2(self.act(gate) * self.w3(self.w2(gate)))


@lookalike(FUSED)
def self_gated(self, x):
    gate = self.w1(x)
    return self.w2(self.act(gate) * gate)


@lookalike(SKIPPED)
def gate_in_place(self, x):
    return self.w2(F.silu(self.w1(x), inplace=True) * self.w3(x))


@lookalike(SKIPPED)
def gate_in_place_and_used_again(self, x):
    gate = self.w1(x)
    return self.w2(F.silu(gate, inplace=True) * self.w3(x) + gate)


@lookalike(SKIPPED, act=functools.partial(nn.SiLU, inplace=True))
def gate_in_place_by_a_module(self, x):
    gate = self.w1(x)
    return self.w2(self.act(gate) * self.w3(x) + gate)


@lookalike(FUSED)
def input_in_place(self, x):
    x *= 2
    return self.w2(self.act(self.w1(x)) * self.w3(x))


@lookalike(FUSED)
def tensor_made_inside(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) * torch.tensor(0.5)


@lookalike(FUSED)
def noise_made_inside(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) + torch.randn(1)


@lookalike(SKIPPED)
def another_activation(self, x):
    return self.w2(F.gelu(self.w1(x)) * self.w3(x))


@lookalike(FUSED)
def broadcast_up(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)[..., :1])


@lookalike(FUSED)
def keyword_only_scale(self, x, *, scale=2.0):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) * scale


@lookalike(FUSED)
def returns_a_tuple(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)), None
