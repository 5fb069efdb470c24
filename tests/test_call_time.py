"""What Python decides at every call is decided at every call of a fused module too: patching freezes nothing."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from support.kernel import HAS_KERNEL, launched
from support.models import HIDDEN, WIDE, GatedMLP, hidden_states
from torch import nn

from hf_swiglu import patch_model
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches

SETTINGS = types.SimpleNamespace(scale=1.0)


class Config:
    """With a property that is read anew at every call."""

    def __init__(self):
        self.values = [1.0]

    @property
    def scale(self):
        return self.values[0]


class Base(GatedMLP):
    multiplier = 1.0

    def __init__(self):
        super().__init__()
        self.config, self.scales, self.strength = Config(), [1.0, 2.0], 1.0
        self.register_parameter("layer_scale", None)
        self.register_buffer("mask", None)

    def product(self, x):
        return self.act(self.w1(x)) * self.w3(x)


class OfTheClass(Base):
    def forward(self, x):
        return self.w2(self.product(x)) * self.multiplier


class OfTheConfig(Base):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.config.scale


class OfAList(Base):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * self.scales[0]


class OfAGlobal(Base):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * SETTINGS.scale


class WithAnOptionalParameter(Base):
    def forward(self, x):
        out = self.w2(self.act(self.w1(x)) * self.w3(x))
        return out if self.layer_scale is None else out * self.layer_scale


class WithAnOptionalBuffer(Base):
    def forward(self, x):
        return self.w2(self.product(x) if self.mask is None else self.product(x) * self.mask)


class WithADefault(Base):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * getattr(self, "steering", 1.0)


class WithAnOptionalChild(Base):
    def forward(self, x):
        product = self.act(self.w1(x)) * self.w3(x)
        return self.w2(self.norm(product) if hasattr(self, "norm") else product)


class WithRandomNumbers(Base):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x)) * torch.rand(())


def set_attribute(name, value):
    return lambda module: setattr(module, name, value)


CHANGES = {
    "class attribute on the instance": (OfTheClass, set_attribute("multiplier", 0.22)),
    "class attribute on the class": (OfTheClass, lambda module: setattr(type(module).__mro__[1], "multiplier", 1.0)),
    "config": (OfTheConfig, lambda module: module.config.values.insert(0, 3.0)),
    "list": (OfAList, lambda module: module.scales.reverse()),
    "global": (OfAGlobal, lambda module: setattr(SETTINGS, "scale", 0.5)),
    "parameter": (WithAnOptionalParameter, lambda m: m.register_parameter("layer_scale", nn.Parameter(torch.rand(64)))),
    "buffer": (WithAnOptionalBuffer, lambda module: module.register_buffer("mask", torch.rand(WIDE))),
    "default": (WithADefault, set_attribute("steering", 0.1)),
    "child": (WithAnOptionalChild, lambda module: module.add_module("norm", nn.LayerNorm(WIDE))),
    "random": (WithRandomNumbers, lambda module: None),
    "activation in place": (OfTheClass, lambda module: setattr(module.act, "inplace", True)),
    "another activation": (OfTheClass, set_attribute("act", nn.GELU())),
    "activation hooked": (
        OfTheClass,
        lambda m: m.act.register_forward_hook(lambda module, args, out: out * 2) and None,
    ),
    "activation's forward": (OfTheClass, lambda module: setattr(module.act, "forward", torch.tanh)),
    "activation deleted": (OfTheClass, lambda module: (delattr(module, "act"), setattr(module, "act", nn.Tanh()))),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, when, monkeypatch):
    cls, apply = CHANGES[change]
    monkeypatch.setattr(SETTINGS, "scale", 1.0)
    torch.manual_seed(0)
    layers = nn.ModuleList([cls(), cls(), cls()])
    x = hidden_states()
    if when == "before":
        apply(layers[1])
    patch_model(layers, verify=True)
    if when == "after":
        apply(layers[1])
    for layer in layers:
        torch.manual_seed(1)
        fused = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused, cls.forward(layer, x))
        assert isinstance(layer, FusedModule) or change.startswith(("activation", "another"))


@pytest.mark.parametrize("where", ["silu module", "silu function", "mlp", "helper", "mlp's base"])
def test_code_replaced_on_a_class_runs(where, monkeypatch):
    class Helped(Base):
        def forward(self, x):
            return self.w2(self.product(x))

    class Inheriting(Helped):
        pass

    module = (Inheriting if where == "mlp's base" else Helped)()
    patch_model(nn.Sequential(module))
    x = hidden_states()
    seen = []

    def instead(*args, **kwargs):
        seen.append(args)
        return torch.tanh(args[-1]) if where.startswith("silu") else torch.zeros(2)

    owner, name = {
        "silu module": (nn.SiLU, "forward"),
        "silu function": (F, "silu"),
        "mlp": (Helped, "forward"),
        "helper": (Base, "product"),
        "mlp's base": (Helped, "forward"),
    }[where]
    if where == "helper":
        monkeypatch.setattr(owner, name, lambda self, x: seen.append(x) or torch.zeros(2, WIDE))
    else:
        monkeypatch.setattr(owner, name, instead)
    with counted_launches() as launches:
        result = module(x)
    assert seen and not launches.names
    torch.testing.assert_close(result, Helped.forward(module, x))
    monkeypatch.undo()
    with counted_launches() as launches:
        module(x)
    assert launches.names == launched("swiglu_fwd")


class Parent(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class CallsSuper(Parent):
    def forward(self, x):
        return super().forward(x) + self.w2(self.w3(x) * self.act(self.w1(x)))


class NamesItsClass(Parent):
    def forward(self, x):
        return super(__class__, self).forward(x) + self.w2(self.act(self.w1(x)) * self.w3(x))  # noqa: UP008


class Private(GatedMLP):
    def __init__(self):
        super().__init__()
        self.__act, self.__scale = nn.SiLU(), 2.0

    def __product(self, x):
        return self.__act(self.w1(x)) * self.w3(x) * self.__scale

    def forward(self, x):
        return self.w2(self.__product(x))


def in_a_closure():
    scale, silu = 0.5, F.silu

    class Closing(GatedMLP):
        def forward(self, x, *rest, factor=1.0, **options):
            """With a docstring, defaults and every kind of argument."""
            return self.w2(silu(self.w1(x)) * self.w3(x)) * scale * factor

    return Closing


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * 2

    return wrapper


class Decorated(GatedMLP):
    @doubled
    @doubled
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Nested(GatedMLP):
    def forward(self, x):
        run = lambda y: self.act(self.w1(y)) * self.w3(y)  # noqa: E731
        return (
            self.w2(sum(run(row) for row in x.split(1)).sum(0))
            + torch.stack([self.act(self.w1(y)) * self.w3(y) for y in x])[0, :, :HIDDEN]
        )


class InBothFactors(GatedMLP):
    def forward(self, x):
        return self.w2((self.act(self.w1(x)) * self.w3(x)) * self.act(self.act(self.w1(x)) * self.w3(x)))


FORMS = [CallsSuper, NamesItsClass, Private, in_a_closure(), Decorated, Nested, InBothFactors]


@pytest.mark.parametrize("cls", FORMS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_methods_of_every_form(cls, grad):
    torch.manual_seed(0)
    module = cls()
    x = hidden_states()
    with torch.set_grad_enabled(grad):
        expected = module(x)
        assert len(patch_model(nn.Sequential(module), verify=True).fused) == 1
        with counted_launches() as launches:
            torch.testing.assert_close(module(x), expected)
    assert bool(launches) is HAS_KERNEL


def test_a_method_that_is_not_its_source_is_left_alone(tmp_path):
    path = tmp_path / "edited.py"
    source = "from support.models import GatedMLP\nclass Edited(GatedMLP):\n    def forward(self, x):\n        return "
    path.write_text(source + "self.w2(self.act(self.w1(x)) * self.w3(x))\n")
    namespace = {"__name__": "edited"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    # The file changes after it was imported: what runs is the old code.
    path.write_text(source + "self.w2(self.act(self.w1(x)) * self.w3(x) * 2)\n")
    module = namespace["Edited"]()
    report = patch_model(nn.Sequential(module), strict=False)
    assert not report.fused and "source" in report[0].reason
    unreadable = {}
    exec(source.replace("return ", "return self.w2(self.act(self.w1(x)) * self.w3(x))"), unreadable)
    report = patch_model(nn.Sequential(unreadable["Edited"]()), strict=False)
    assert not report.fused and "source is not available" in report[0].reason


def test_the_order_of_evaluation_is_kept():
    class Ordered(GatedMLP):
        def forward(self, x):
            first = self.call("act", self.act)(self.call("w1", self.w1)(x)) * self.call("w3", self.w3)(x)
            second = self.call("w3", self.w3)(x) * self.call("act", self.act)(self.call("w1", self.w1)(x))
            return self.w2(first + second)

        def call(self, name, child):
            self.seen.append(name)
            return child

    for activation in (nn.SiLU(), nn.GELU()):
        module = Ordered()
        module.act, module.seen = nn.SiLU(), []
        patch_model(nn.Sequential(module), strict=False)
        module.act = activation
        module(hidden_states())
        assert module.seen == ["act", "w1", "w3", "w3", "act", "w1"]


def test_tracebacks_show_the_users_own_lines():
    class Failing(GatedMLP):
        def forward(self, x):
            product = self.act(self.w1(x)) * self.w3(x)
            return self.w2(product[:, :0])  # this line fails

    module = Failing()
    patch_model(nn.Sequential(module))
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(3, HIDDEN))
    lines = [str(entry.statement) for entry in caught.traceback if str(entry.path) == __file__]
    assert any("this line fails" in line for line in lines)
