"""What others see of a fused model: hooks, files, copies and pickles are what they were."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support.kernel import launched, needs_kernel
from support.models import HIDDEN, WIDE, GatedMLP, hidden_states, tiny_llama, tiny_phi3, tokens
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_swiglu import patch_model, unpatch_model
from hf_swiglu.commands import peak_memory
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches


@pytest.fixture
def mlp():
    """A fused MLP in a model of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP()).eval()
    patch_model(model)
    return model[0]


def _reuses_gate(mlp, grad=False):
    """Whether the product was written over its first operand."""
    with counted_launches() as launches, torch.set_grad_enabled(grad):
        mlp(hidden_states())
    (launch,) = launches
    assert launches.names == ["swiglu_fwd"]
    # Of packed tensors the output is never the input.
    return launch.tensors[-1].data_ptr() == launch.tensors[0].data_ptr()


@needs_kernel
def test_gates_memory_is_reused_without_gradients_and_kept_with_them(mlp):
    assert _reuses_gate(mlp)
    assert not _reuses_gate(mlp, grad=True)
    mlp.requires_grad_(False)
    assert _reuses_gate(mlp, grad=True)
    with torch.inference_mode():
        assert _reuses_gate(mlp)


@pytest.mark.parametrize(("activation", "saved"), [("silu", 1), ("swiglu", 0)])
def test_gates_memory_is_reused_by_plain_pytorch_too(activation, saved):
    # float64 has no kernel. Eager's own numbers, and of its three buffers one less for SiLU.
    model, x = GatedMLP(), hidden_states(torch.float64)
    model.act = ACT2FN[activation]
    model.double()
    with torch.no_grad():
        expected, eager_peak = model(x), peak_memory.peak_bytes(lambda: model(x), x.device)
        patch_model(model)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        peak = peak_memory.peak_bytes(lambda: model(x), x.device)
    assert peak == eager_peak - saved * expected.shape[:-1].numel() * WIDE * x.element_size()


class KeptLinear(nn.Linear):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class GateUsedAgain(GatedMLP):
    def forward(self, x):
        gate = self.w1(x)
        return self.w2(self.act(gate) * self.w3(x)) + gate[..., :1]


@needs_kernel
def test_gates_memory_is_not_reused_when_a_hook_or_wrapper_may_hold_it(mlp):
    kept = []
    handle = mlp.w1.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    assert not _reuses_gate(mlp)
    torch.testing.assert_close(*kept[0], rtol=0, atol=0)
    handle.remove()
    assert _reuses_gate(mlp)

    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    with counted_launches() as launches, torch.no_grad():
        mlp(hidden_states())
    handle.remove()
    # A hook on every module sees the activation too, so that nothing is left to fuse.
    assert mlp.act in seen and not launches

    original = mlp.w1.forward
    mlp.w1.forward = lambda x: original(x)
    assert _reuses_gate(mlp), "a wrapper that keeps nothing"
    mlp.w1.forward = lambda x: kept.append(original(x)) or kept[-1]
    assert not _reuses_gate(mlp)
    del mlp.w1.forward

    def keeps_a_view(x):
        gate = original(x)
        kept.append(gate.detach())
        return gate

    mlp.w1.forward = keeps_a_view
    assert not _reuses_gate(mlp)
    del mlp.w1.forward

    mlp.w1.__class__ = KeptLinear
    assert not _reuses_gate(mlp)

    again = nn.Sequential(GateUsedAgain())
    patch_model(again)
    assert not _reuses_gate(again[0])


class PackedMLP(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, 2 * WIDE, bias=False), nn.Linear(WIDE, HIDDEN, bias=bias)

    def forward(self, x):
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(nn.functional.silu(gate) * up)


@needs_kernel
def test_a_packed_gates_memory_is_reused_where_the_projection_reads_it_in_place():
    torch.manual_seed(0)
    mlp, x = PackedMLP().eval(), hidden_states()
    with torch.no_grad():
        expected = mlp(x)
        patch_model(mlp)
        torch.testing.assert_close(mlp(x), expected)
        # Gate and up, and the output.
        allocated = x.shape[:-1].numel() * (2 * WIDE + HIDDEN) * x.element_size()
        assert peak_memory.peak_bytes(lambda: mlp(x), x.device) == allocated
    assert _reuses_gate(mlp) and not _reuses_gate(mlp, grad=True)

    kept = []
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: kept.append(out))
    assert not _reuses_gate(mlp)
    handle.remove()
    # Rows that lie apart are not what a hook of the projection would see without us.
    mlp.fc2.register_forward_hook(lambda module, args, out: None)
    assert not _reuses_gate(mlp)
    # With a bias the projection would copy the rows that lie apart.
    biased = PackedMLP(bias=True)
    patch_model(biased)
    assert not _reuses_gate(biased)


def test_hooks_fire_as_before_and_see_the_same():
    # The order may differ: the activation of a fused module is called when both projections were.
    model = nn.Sequential(GatedMLP()).double()
    seen = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, "pre", args[0])))
        module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, "post", out)))
        module.register_full_backward_hook(lambda module, grads, outs, name=name: seen.append((name, "back", outs[0])))
    runs = []
    for patch in (lambda model: None, patch_model):
        patch(model)
        seen.clear()
        model(hidden_states(torch.float64).requires_grad_()).sum().backward()
        runs.append(list(seen))
    before, after = ({entry[:2]: entry[2] for entry in run} for run in runs)
    assert len(runs[0]) == len(runs[1]) == len(before) and ("0.act", "post") in before
    torch.testing.assert_close(after, before)


def test_hooks_that_only_gather_parameters_leave_the_activation_fused(mlp):
    gathered = []

    def gather(module, args):
        gathered.append(module)

    # Where DeepSpeed's own come from.
    namespace = {"__name__": "deepspeed.runtime.zero.parameter_offload", "gather": gather}
    exec("def hook(module, args): gather(module, args)", namespace)
    for module in mlp.modules():
        module.register_forward_pre_hook(namespace["hook"])
    with counted_launches() as launches:
        mlp(hidden_states())
        assert launches.names == launched("swiglu_fwd") and {mlp.w1, mlp.w2, mlp.w3} <= set(gathered)
        mlp.act.register_forward_hook(lambda module, args, out: None)
        mlp(hidden_states())
    assert launches.names == launched("swiglu_fwd") and mlp.act in gathered


def test_a_global_hook_sees_the_same_modules(mlp):
    names = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: names.append(type(module).__name__)
    )
    try:
        mlp(hidden_states())
    finally:
        handle.remove()
    assert sorted(names) == ["GatedMLP", "Linear", "Linear", "Linear", "SiLU"]


@pytest.mark.parametrize("grad", [True, False])
def test_an_activation_replaced_after_patching_takes_effect(mlp, grad):
    with torch.set_grad_enabled(grad):
        for replacement in (nn.GELU(), ACT2FN["swiglu"], nn.SiLU()):
            mlp.act = replacement
            torch.testing.assert_close(mlp(hidden_states()), GatedMLP.forward(mlp, hidden_states()))


def test_a_forward_put_on_the_activation_itself_takes_effect(mlp):
    mlp.act.forward = torch.tanh
    torch.testing.assert_close(mlp(hidden_states()), GatedMLP.forward(mlp, hidden_states()))


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_names_parameters_and_types(build):
    model = build()
    original = type(model.model.layers[0].mlp)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules()]
    patch_model(model)
    assert list(model.state_dict()) == keys
    assert {name: id(value) for name, value in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert [name for name, _ in model.named_modules()] == modules
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, original) and type(mlp).__name__ == original.__name__
    assert (type(mlp).__module__, type(mlp).__qualname__) == (original.__module__, original.__qualname__)
    assert f"(mlp): Fused{original.__name__}(" in repr(model)


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_save_pretrained_writes_the_same_bytes(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "before")
    patch_model(model)
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "config.json" in files and "model.safetensors" in files
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == files
    for name in files:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name


def test_a_deep_copy_is_fused_and_independent():
    model = tiny_llama()
    patch_model(model)
    twin = copy.deepcopy(model)
    expected = model(tokens()).logits
    with counted_launches() as launches:
        torch.testing.assert_close(twin(tokens()).logits, expected, rtol=0, atol=0)
    assert launches.names == launched("swiglu_fwd") * 2
    unpatch_model(twin)
    torch.nn.init.zeros_(twin.model.layers[0].mlp.down_proj.weight)
    assert isinstance(model.model.layers[0].mlp, FusedModule)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=0)


def test_a_shallow_copy_is_fused_and_shares_its_children(mlp):
    twin = copy.copy(mlp)
    assert type(twin) is type(mlp) and twin.w1 is mlp.w1 and list(vars(twin)) == list(vars(mlp))
    torch.testing.assert_close(twin(hidden_states()), mlp(hidden_states()), rtol=0, atol=0)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_carries_the_original_class(protocol):
    model = tiny_llama()
    patch_model(model)
    data = pickle.dumps(model, protocol)
    assert b"hf_swiglu" not in data
    loaded = pickle.loads(data)
    assert type(loaded.model.layers[0].mlp) is LlamaMLP and isinstance(model.model.layers[0].mlp, FusedModule)
    torch.testing.assert_close(loaded.double()(tokens()).logits, model.double()(tokens()).logits)


@pytest.mark.slow
def test_torch_save_loads_where_hf_swiglu_was_never_imported(tmp_path):
    model = tiny_llama().double()
    patch_model(model)
    with torch.no_grad():
        torch.save({"model": model, "ids": tokens(), "logits": model(tokens()).logits}, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)["model"]
    assert type(loaded.model.layers[0].mlp) is LlamaMLP and len(patch_model(loaded).fused) == 2
    script = (
        "import sys, torch\n"
        "sys.modules['hf_swiglu'] = None\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(saved['model'](saved['ids']).logits, saved['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True)
