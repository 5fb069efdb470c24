"""Random models, patched, trained, changed and unpatched in random order: what they would be without the patch."""

import contextlib
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from support.models import SIZES, GatedMLP
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, MixtralConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.patching import patch_model as patch
from hf_swiglu.patching.rewriting import fused_classes
from hf_swiglu.patching.rewriting.fused_classes import FusedModule

WIDTH = 32
CONFIG = SIZES | {"hidden_size": WIDTH, "intermediate_size": 96}


class Scaled(GatedMLP):
    scale = 1.0

    def __init__(self):
        nn.Module.__init__(self)
        self.w1, self.w3, self.w2 = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.w3(x) * self.act(self.w1(x))) * self.scale


class Functional(Scaled):
    def forward(self, x):
        gate = self.w1(x).clamp(max=2.0)
        return self.w2(F.silu(gate) * self.w3(x).clamp(-2.0, 2.0)) * self.scale


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


KINDS = [
    Scaled,
    Functional,
    Plain,
    lambda: LlamaMLP(LlamaConfig(**CONFIG)),
    lambda: LlamaMLP(LlamaConfig(**CONFIG, hidden_act="gelu")),
    lambda: LlamaMLP(LlamaConfig(**CONFIG, hidden_act="swiglu")),
    lambda: Phi3MLP(Phi3Config(**CONFIG)),
    lambda: MixtralSparseMoeBlock(MixtralConfig(**CONFIG, num_local_experts=2, experts_implementation="eager")),
]


class Residual(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            out = layer(x)
            x = F.layer_norm(x + (out[0] if isinstance(out, tuple) else out), (WIDTH,))
        return x


def build(rng):
    layers = [rng.choice(KINDS)() for _ in range(rng.randint(1, 5))]
    if len(layers) > 1 and rng.random() < 0.3:
        # One module in two places.
        layers[-1] = layers[0]
    model = Residual(layers)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.double()


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def gated(model):
    return [module for module in model.modules() if hasattr(module, "act") or hasattr(module, "act_fn")]


def train(model, rng):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    model.zero_grad()
    out = model(torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=generator))
    if out.requires_grad:
        out.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())
    return [out.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def infer(model, rng):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    with torch.no_grad():
        return [model(torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=generator))]


def hook(model, rng):
    rng.choice(list(model.modules())).register_forward_hook(lambda module, args, out: None)


def scaling_hook(model, rng):
    if linears(model):
        rng.choice(linears(model)).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def change_attribute(model, rng):
    for module in model.modules():
        if isinstance(module, Scaled) and rng.random() < 0.5:
            module.scale = rng.choice([0.5, 2.0])


def change_activation(model, rng):
    if gated(model):
        module, name = rng.choice(gated(model)), rng.choice(["SiLU", "GELU", "Tanh"])
        setattr(module, "act" if hasattr(module, "act") else "act_fn", getattr(nn, name)())


def replace_forward(model, rng):
    modules = [module for module in gated(model) if "forward" not in vars(module) and module is not model]
    if modules:
        module = rng.choice(modules)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def parametrize_weight(model, rng):
    candidates = [linear for linear in linears(model) if not parametrize.is_parametrized(linear)]
    if candidates:
        parametrize.register_parametrization(rng.choice(candidates), "weight", Doubled())


def remove_parametrization(model, rng):
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
            return


def freeze(model, rng):
    rng.choice(list(model.parameters())).requires_grad_(False)


def switch_mode(model, rng):
    model.train(rng.random() < 0.5)


STEPS = [
    train, train, infer, hook, scaling_hook, change_attribute, change_activation, replace_forward, parametrize_weight,
    remove_parametrization, freeze, switch_mode,
]  # fmt: skip


def class_of(module):
    # parametrize makes a class for each module.
    return type(module).__bases__ if parametrize.is_parametrized(module) else type(module)


def do_patch(model, rng):
    patch_model(model, strict=False, keep=rng.randrange(4))


def do_unpatch(model, rng):
    unpatch_model(model)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_random_model_is_what_it_would_be_unpatched(block):
    for seed in range(30 * block, 30 * (block + 1)):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        plain = build(rng)
        patched = copy.deepcopy(plain)
        steps = [do_patch] + [rng.choice([*STEPS, do_patch, do_unpatch]) for _ in range(8)] + [train, do_unpatch, infer]
        for at, step in enumerate(steps):
            # The same choices for both.
            choices = rng.randrange(2**32)
            results = []
            for model in (plain, patched):
                if model is patched or step not in (do_patch, do_unpatch):
                    results.append(step(model, random.Random(choices)))
            if results[0] is not None and len(results) == 2:
                where = f"seed {seed}, {[each.__name__ for each in steps[: at + 1]]}"
                for before, after in zip(*results, strict=True):
                    assert torch.allclose(after, before, rtol=1e-9, atol=1e-12), where
        for what in (class_of, lambda module: list(vars(module))):
            assert list(map(what, patched.modules())) == list(map(what, plain.modules())), seed
        states = [model.state_dict() for model in (plain, patched)]
        assert states[0].keys() == states[1].keys()
        torch.testing.assert_close(*states)


class Fault(BaseException):
    """As an interrupt is."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_fault_at_any_step_leaves_the_model_untouched(seed, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = build(rng)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    places = [
        (fused_classes, "fused_over"),
        (fused_classes, "class_changes"),
        (patch, "_planned"),
        (patch, "survey"),
        (patch, "compare"),
    ]
    for owner, name in places:
        for at in range(4):
            calls, original = [], getattr(owner, name)

            def failing(*args, calls=calls, original=original, at=at):
                calls.append(args)
                if len(calls) == at + 1:
                    raise Fault
                return original(*args)

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, failing)
                with contextlib.suppress(Fault):
                    patch_model(model, strict=False, verify=name == "compare")
            if len(calls) <= at:
                # Nothing was hit.
                unpatch_model(model)
            assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert not any(isinstance(module, FusedModule) for module in model.modules())
