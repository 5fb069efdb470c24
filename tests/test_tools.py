"""Fused models in the hands of other tools: what works on the original works, and gives the same."""

import copy
import inspect
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support.kernel import launched
from support.models import GatedMLP, hidden_states
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches
from tools.model_support.comparison import EXPERTS_IMPLEMENTATIONS


@pytest.fixture
def pair():
    torch.manual_seed(0)
    mlp = GatedMLP().eval()
    fused = copy.deepcopy(mlp)
    patch_model(nn.Sequential(fused))
    return mlp, fused


def test_fx_symbolic_trace(pair):
    graphs = [torch.fx.symbolic_trace(mlp) for mlp in pair]
    assert str(graphs[0].graph) == str(graphs[1].graph)
    torch.testing.assert_close(graphs[1](hidden_states()), pair[0](hidden_states()))


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(pair, grad):
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(pair[1], hidden_states())
        torch.testing.assert_close(traced(hidden_states()), pair[0](hidden_states()))


def test_jit_script(pair):
    scripted = torch.jit.script(pair[1])
    torch.testing.assert_close(scripted(hidden_states()), pair[0](hidden_states()))


@pytest.mark.parametrize("strict", [True, False])
def test_export(pair, strict):
    programs = [torch.export.export(mlp, (hidden_states(),), strict=strict) for mlp in pair]
    operators = [[node.target for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    assert operators[0] == operators[1]
    torch.testing.assert_close(programs[1].module()(hidden_states()), pair[0](hidden_states()))


def test_signature_source_and_names(pair):
    mlp, fused = (each.forward for each in pair)
    assert inspect.signature(fused) == inspect.signature(mlp)
    assert inspect.getsource(fused) == inspect.getsource(mlp)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(fused, name) == getattr(mlp, name)


def test_vmap_and_functional_call(pair):
    x = hidden_states()
    for mlp in pair:
        vmapped = torch.vmap(mlp)(x)
        torch.testing.assert_close(vmapped, pair[0](x))
        parameters = {name: value * 2 for name, value in mlp.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(mlp, parameters, (x,)), torch.func.functional_call(pair[0], parameters, (x,))
        )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_the_originals(pair, protocol):
    data = [pickle.dumps(mlp, protocol) for mlp in pair]
    assert isinstance(pair[1], FusedModule), "the module itself stays fused"
    loaded = pickle.loads(data[1])
    assert type(loaded) is GatedMLP
    torch.testing.assert_close(loaded(hidden_states()), pair[0](hidden_states()))
    if protocol >= 2:
        assert b"_reconstructor" not in data[1] and b"hf_swiglu" not in data[1]


def test_weights_only_loads_the_file(pair):
    file = io.BytesIO()
    torch.save(nn.Sequential(pair[1]), file)
    file.seek(0)
    allowed = [GatedMLP, nn.Sequential, nn.Linear, nn.SiLU, set]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(loaded(hidden_states()), pair[0](hidden_states()))


class Rebuilt(GatedMLP):
    """With ways of its own to be copied and pickled."""

    def __reduce__(self):
        return type(self), (), {"told": "reduced"}

    def __setstate__(self, state):
        self.told = state["told"]

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.told = "copied"
        return twin

    __copy__ = lambda self: self  # noqa: E731


def test_copies_and_pickles_of_the_classs_own():
    model = nn.Sequential(Rebuilt())
    patch_model(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded[0]) is Rebuilt and loaded[0].told == "reduced"
    assert copy.deepcopy(model)[0].told == "copied" and copy.copy(model[0]) is model[0]
    assert isinstance(model[0], FusedModule)


def test_a_method_replaced_on_the_class_of_a_fused_module(pair):
    _, fused = pair
    cls, forward = type(fused), type(fused).forward
    cls.forward = lambda self, x: forward(self, x) * 2
    try:
        torch.testing.assert_close(fused(hidden_states()), pair[0](hidden_states()) * 2)
        other = nn.Sequential(GatedMLP())
        patch_model(other)
        torch.testing.assert_close(other[0](hidden_states()), GatedMLP.forward(other[0], hidden_states()))
    finally:
        cls.forward = forward


def test_where_saved_tensor_hooks_are_disabled(pair):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        results = [mlp(hidden_states().requires_grad_()).sum() for mlp in pair]
    for result in results:
        result.backward()
    torch.testing.assert_close(pair[1].w2.weight.grad, pair[0].w2.weight.grad)


class Unpicklable(GatedMLP):
    def __init__(self):
        super().__init__()
        self.hook = lambda: None


def test_a_pickle_that_fails_leaves_the_module_fused():
    model = nn.Sequential(Unpicklable())
    patch_model(model)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)
    assert isinstance(model[0], FusedModule)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def experts_model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, vocab_size=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.config._experts_implementation = EXPERTS_IMPLEMENTATIONS[-1]
    return model


@pytest.mark.parametrize("patched", ["before", "between", "after"])
def test_a_parametrization_comes_and_goes(patched):
    results, classes = [], []
    ids = torch.randint(0, 64, (2, 64))
    for when in ("never", patched):
        model = experts_model()
        experts = model.model.layers[0].mlp.experts
        original = type(experts)
        if when == "before":
            patch_model(model)
        parametrize.register_parametrization(experts, "gate_up_proj", Twice())
        if when == "between":
            patch_model(model, verify=True)
        seen = [model(ids).logits]
        twin = copy.deepcopy(model)
        seen.append(twin(ids).logits)
        if when == "after":
            patch_model(model)
            parametrized = type(experts)
            unpatch_model(model)
            assert not isinstance(experts, FusedModule) and type(experts) is not parametrized
            patch_model(model)
        parametrize.remove_parametrizations(experts, "gate_up_proj")
        seen.append(model(ids).logits)
        assert isinstance(experts, FusedModule) == (when != "never")
        unpatch_model(model)
        seen.append(model(ids).logits)
        classes.append(type(experts) is original)
        results.append(seen)
    assert classes == [True, True]
    torch.testing.assert_close(results[1], results[0])


def test_pruning_of_projections(pair):
    for mlp in pair:
        prune.l1_unstructured(mlp.w1, "weight", 0.5)
        prune.l1_unstructured(mlp.w2, "weight", 0.5)
    results = [mlp(hidden_states()).square().sum() for mlp in pair]
    for result in results:
        result.backward()
    torch.testing.assert_close(*results)
    torch.testing.assert_close(pair[1].w2.weight_orig.grad, pair[0].w2.weight_orig.grad)


class Expert(nn.Module):
    """As calibration tools split packed experts."""

    def __init__(self, experts, index):
        super().__init__()
        self.gate, self.up = (nn.Parameter(part.detach().clone()) for part in experts.gate_up_proj[index].chunk(2, 0))
        self.down, self.act_fn = nn.Parameter(experts.down_proj[index].detach().clone()), experts.act_fn

    def forward(self, x):
        return F.linear(self.act_fn(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def test_the_experts_activation_serves_elsewhere():
    model = experts_model()
    experts, x = model.model.layers[0].mlp.experts, torch.randn(128, 64)
    activation, expected = experts.act_fn, Expert(experts, 0)(x)
    patch_model(model)
    assert experts.act_fn is activation
    for expert in (
        Expert(experts, 0),
        copy.deepcopy(Expert(experts, 0)),
        pickle.loads(pickle.dumps(Expert(experts, 0))),
    ):
        torch.testing.assert_close(expert(x), expected)
    torch.testing.assert_close(-experts.act_fn(x)[0], -F.silu(x)[0])


def test_a_forward_wrapped_on_the_instance_is_unpatched_with_it(pair):
    _, fused = pair
    forward, calls = fused.forward, []
    fused.forward = lambda *args: calls.append(args) or forward(*args)
    with counted_launches() as launches:
        fused(hidden_states())
    assert launches.names == launched("swiglu_fwd")
    assert unpatch_model(fused) == 1
    with counted_launches() as launches:
        torch.testing.assert_close(fused(hidden_states()), pair[0](hidden_states()))
    assert not launches.names and len(calls) == 2


def test_threads_use_and_pickle_one_module_at_once(pair):
    expected, errors = pair[0](hidden_states()), []

    def work():
        try:
            for _ in range(20):
                torch.testing.assert_close(pair[1](hidden_states()), expected)
                pickle.dumps(pair[1])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and isinstance(pair[1], FusedModule)


def in_a_child(model, queue):
    queue.put((isinstance(model[0], FusedModule), model(hidden_states()).detach().numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(pair, method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    torch.set_num_threads(1)
    child = context.Process(target=in_a_child, args=(nn.Sequential(pair[1]), queue))
    child.start()
    fused, output = queue.get(timeout=120)
    child.join()
    assert fused == (method == "fork")
    torch.testing.assert_close(torch.from_numpy(output), pair[0](hidden_states()).detach())


def test_registries_of_subclasses_get_no_entry():
    registered = []

    class Registered(GatedMLP):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            registered.append(name)

    class Mine(Registered, name="mine"):
        pass

    model = nn.Sequential(Mine())
    assert len(patch_model(model).fused) == 1
    assert registered == ["mine"]
