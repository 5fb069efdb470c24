"""keep=3, 2, 1, 0: what an MLP keeps for backward, what that costs, and that outputs and gradients are eager's."""

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.models import HIDDEN, WIDE, GatedMLP, hidden_states, tiny_gemma, tiny_llama, tiny_phi3, tokens
from test_memory import (
    LARGE,
    TOKENS,
    Quantised,
    ScaledInPlace,
    autocast,
    frozen,
    llama,
    lora,
    not_reentrant,
    offloaded,
    phi3,
    plain,
    reentrant,
    resident,
    selective,
    with_down,
)  # fmt: skip
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP

from hf_swiglu import backends, patch_model, patch_on_load, unpatch_model
from hf_swiglu.commands.cli import main
from hf_swiglu.patching.rewriting.fused_classes import FusedModule

needs_kernel = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


def gemma(hidden=HIDDEN, wide=WIDE) -> nn.Module:
    return GemmaMLP(GemmaConfig(hidden_size=hidden, intermediate_size=wide)).train()


def gemma_with_lora(*sizes) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]), gemma(*sizes))


# Whose MLP, the buffers that it keeps with keep=3, 2, 1, 0, and the share of its arithmetic that both projections are.
KEPT = {
    "LLaMA": (llama, [3, 2, 1, 0], 2 / 9),
    "Phi-3": (phi3, [3, 2, 2, 0], 2 / 9),
    "Gemma": (gemma, [4, 4, 1, 0], 2 / 9),
    "LoRA": (lora, [3, 2, 1, 0], 6 / 19),
    "LoRA with dropout": (partial(lora, dropout=0.1), [4, 2, 1, 0], 6 / 19),
    "LoRA on Gemma": (gemma_with_lora, [4, 4, 1, 0], 6 / 19),
    "frozen": (frozen, [2, 2, 1, 0], 2 / 6),
}


def built(build, *sizes, **setting):
    torch.manual_seed(0)
    mlp = build(*sizes)
    return mlp, patch_model(mlp, strict=False, **setting) if setting else None


def in_process_memory(build, **setting) -> float:
    mlp, _ = built(build, *LARGE, **setting)
    x = torch.randn(TOKENS, LARGE[0], requires_grad=True)
    mlp(x)
    before = resident()
    out = mlp(x)
    held = resident() - before
    del out
    return held / (TOKENS * LARGE[1] * 4)


@needs_kernel
@pytest.mark.parametrize("name", KEPT)
def test_buffers_kept_by_process_memory(name):
    build, expected, _ = KEPT[name]
    assert [in_process_memory(build, keep=keep) for keep in (3, 2, 1, 0)] == pytest.approx(expected, abs=0.1)


def operations(build, **setting) -> int:
    mlp, _ = built(build, 128, 1024, **setting)
    with FlopCounterMode(display=False) as counter:
        mlp(torch.randn(64, 128, requires_grad=True)).sum().backward()
    return counter.get_total_flops()


@needs_kernel
@pytest.mark.parametrize("name", KEPT)
def test_the_arithmetic_of_each_setting(name):
    """The down projection never runs again, gate's and up's do: +0, +11 and +22 % where all weights are trained."""
    build, kept, both = KEPT[name]
    extra = [operations(build, keep=keep) / operations(build) - 1 for keep in (3, 2, 1, 0)]
    assert extra == pytest.approx([0, 0, both / 2 if kept[2] == 1 else 0, both], abs=0.02)


@needs_kernel
@pytest.mark.parametrize("build", [llama, phi3, gemma, lora], ids=["llama", "phi3", "gemma", "lora"])
@pytest.mark.parametrize("setting", [{"keep": 2}, {"keep": 1}, {"keep": 0}, {"tile": 16}], ids=str)
def test_down_is_not_called_in_backward(build, setting):
    mlp, _ = built(build, **setting)
    calls, out = [], mlp(hidden_states().requires_grad_())
    mlp.down_proj.register_forward_pre_hook(lambda module, args: calls.append(args))
    out.sum().backward()
    assert not calls


def run_and_differentiate(mlp, run=plain):
    torch.manual_seed(1)
    x = hidden_states().requires_grad_()
    out = run(mlp, x)
    (out * torch.linspace(-1, 1, HIDDEN)).square().sum().backward()
    return [out.detach(), *(each.grad for each in (x, *mlp.parameters()) if each.requires_grad)]


def assert_close(results, expected, tolerance=1e-5):
    for result, wanted in zip(results, expected, strict=True):
        if wanted is None:
            assert result is None
        else:
            torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def hooked():
    mlp = llama()
    mlp.gate_proj.register_forward_hook(lambda module, args, out: out * 2)
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(),))
    mlp.down_proj.register_forward_hook(lambda module, args, out: out + out.mean())
    return mlp


def quantised():
    mlp = llama().requires_grad_(False)
    for child in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        child.__class__ = Quantised
    return mlp


class WithEnd(GatedMLP):
    """Something after the down projection saves a tensor, so that the recomputation goes beyond it."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.norm(self.drop(self.w2(self.drop(self.act(self.w1(x)) * self.w3(x)))))


class UpFirst(GatedMLP):
    def forward(self, x):
        up = self.w3(x)
        gate = self.w1(x)
        x = up * self.act(gate)
        return self.w2(x)


MODULES = {
    "llama": llama,
    "phi3": phi3,
    "gemma": gemma,
    "lora": lora,
    "lora with dropout": partial(lora, dropout=0.5),
    "frozen": frozen,
    "gate alone trained": partial(frozen, but="gate_proj"),
    "down alone trained": partial(frozen, but="down_proj"),
    "hooks": hooked,
    "quantised": quantised,
    "in place": partial(with_down, ScaledInPlace),
    "something after down": WithEnd,
    "up first": UpFirst,
}
RUNS = {
    "plain": plain, "autocast": autocast, "save_on_cpu": offloaded, "reentrant": reentrant,
    "not_reentrant": not_reentrant, "selective": selective,
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("keep", [3, 2, 1, 0])
def test_outputs_and_gradients_are_eagers(keep, module, run):
    """With dropout too: the same seed gives the masks that eager draws."""
    mlp, _ = built(MODULES[module])
    patched, _ = built(MODULES[module], keep=keep)
    results, expected = (run_and_differentiate(each, RUNS[run]) for each in (patched, mlp))
    assert_close(results, expected, tolerance=3e-2 if run == "autocast" else 1e-5)


@pytest.mark.parametrize("run", ["plain", "autocast", "not_reentrant"])
@pytest.mark.parametrize("module", ["llama", "phi3", "lora", "lora with dropout", "frozen", "up first"])
def test_the_same_bits_whatever_is_kept(module, run):
    results = [run_and_differentiate(built(MODULES[module], keep=keep)[0], RUNS[run]) for keep in (3, 2, 1, 0)]
    for result in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("module", ["llama", "phi3", "gemma", "lora", "lora with dropout"])
@pytest.mark.parametrize("keep", [2, 1, 0])
def test_a_kept_graph_and_the_gradient_of_one_weight(keep, module):
    mlp, _ = built(MODULES[module], keep=keep)
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    loss = mlp(hidden_states()).square().sum()
    first = [grad.clone() for grad in torch.autograd.grad(loss, weights, retain_graph=True)]
    torch.autograd.grad(loss, weights[-1], retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, weights), first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("module", ["llama", "phi3", "gemma", "lora"])
@pytest.mark.parametrize("setting", [{"keep": 1}, {"keep": 0}, {"tile": 16}], ids=str)
def test_second_derivatives(setting, module):
    results = []
    for mlp in (built(MODULES[module])[0], built(MODULES[module], **setting)[0]):
        weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        torch.manual_seed(2)
        for weight in weights:
            nn.init.normal_(weight, std=0.2)
        first = torch.autograd.grad(mlp(hidden_states()).square().mean(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), weights))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("setting", [{"keep": 1}, {"keep": 0}, {"tile": 16}], ids=str)
def test_an_input_that_changed_since_raises(setting):
    mlp, _ = built(llama, **setting)
    x = hidden_states()
    out = mlp(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.fixture
def outputs(monkeypatch):
    """The outputs of all calls of linear projections."""
    linear, seen = nn.functional.linear, []

    def observed(*args):
        out = linear(*args)
        seen.append(out.detach().clone())
        return out

    monkeypatch.setattr(nn.functional, "linear", observed)
    return seen


def test_autocast_and_random_numbers_are_restored_in_backward(outputs):
    mlp, _ = built(partial(lora, dropout=0.5), keep=0)
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(hidden_states())
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    first = outputs.copy()
    out.sum().backward()
    again = outputs[len(first) :]
    assert {each.dtype for each in outputs} == {torch.bfloat16} and len(again) > 1
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.get_rng_state(), expected)


def test_few_rows_are_not_computed_again(outputs):
    mlp, _ = built(llama, keep=0)
    for rows in (31, 32):
        mlp(torch.randn(rows, HIDDEN, requires_grad=True)).sum().backward()
    # Gate, up and down; then gate and up again.
    assert [len(each) for each in outputs] == [31] * 3 + [32] * 5


def writes(self, x):
    self.seen = x
    return self.w2(self.act(self.w1(x)) * self.w3(x))


class Writing(GatedMLP):
    forward = writes


class OfTwo(GatedMLP):
    def forward(self, x, y):
        return self.w2(self.act(self.w1(x)) * self.w3(y))


@pytest.mark.parametrize("cls, note", [(Writing, "writes to self.seen"), (OfTwo, "takes 2 arguments")])
def test_what_may_not_run_twice_keeps_two_and_says_so(cls, note):
    _, report = built(cls, keep=0)
    assert report[0].verdict == "fused" and report[0].keep == 2 and note in report[0].note
    assert f"keep=0 is not possible: its {cls.forward.__name__} {note}" in " ".join(str(report).split())


def test_the_report_says_what_each_module_got():
    model = nn.ModuleDict({"llama": tiny_llama(), "phi": tiny_phi3(), "gemma": tiny_gemma()})
    report = patch_model(model, keep=1)
    assert [(entry.keep, entry.tile, entry.verdict) for entry in report] == (
        [(1, None, "fused")] * 2 + [(2, None, "fused")] * 2 + [(1, None, "memory only")] * 2
    )
    assert "keep=1 is not possible" in report[2].note and len(report.memory_only) == 2
    text = " ".join(str(report).split())
    assert "4 fused, 0 already fused, 2 memory only, 0 skipped" in text and "GELU" in text and "; keep=1" in text
    again = patch_model(model, keep=1)
    assert len(again.already_fused) == 4 and len(again.memory_only) == 2
    assert [entry.verdict for entry in patch_model(model)] == ["fused"] * 2 + ["already fused"] * 2 + ["skipped"] * 2
    assert unpatch_model(model) == 4


@pytest.mark.parametrize("setting", [{"keep": 1}, {"keep": 0}, {"tile": 32}], ids=str)
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3, tiny_gemma])
def test_whole_models_with_verify_copies_pickles_and_undo(build, setting):
    model = build()
    before = [type(module) for module in model.modules()]
    expected = model(input_ids=tokens(), labels=tokens()).loss
    patch_model(model, verify=True, **setting)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss = each(input_ids=tokens(), labels=tokens()).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert isinstance(copy.deepcopy(model).model.layers[0].mlp, FusedModule)
    assert unpatch_model(model) == 2 and [type(module) for module in model.modules()] == before


BAD = [
    ({"keep": 4}, "keep must be 0, 1, 2 or 3.*got 4"),
    ({"keep": -1}, "keep must be.*got -1"),
    ({"keep": True}, "keep must be.*got True"),
    ({"keep": "2"}, "keep must be.*got '2'"),
    ({"tile": 0}, "tile must be a positive integer.*got 0"),
    ({"tile": 1.5}, "tile must be a positive integer.*got 1.5"),
    ({"tile": True}, "tile must be a positive integer.*got True"),
    ({"tile": 512, "keep": 3}, "tile=512.*keep must be 0 or left out; got keep=3"),
    ({"tile": 512, "keep": 2}, "tile=512.*keep must be 0 or left out; got keep=2"),
]


@pytest.mark.parametrize("setting, message", BAD, ids=str)
def test_a_setting_that_makes_no_sense_is_one_error(setting, message, tmp_path, capsys):
    model = tiny_llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch_model(model, activation="swiglu", **setting)
    assert [type(module) for module in model.modules()] == before and model.config.hidden_act == "silu"
    with pytest.raises(ValueError, match=message), patch_on_load(**setting):
        raise AssertionError("the context must not be entered")
    if all(type(value) is int for value in setting.values()):
        script = tmp_path / "script.py"
        script.write_text("raise AssertionError('the script must not run')")
        assert main(["run", *(f"--{name}={value}" for name, value in setting.items()), str(script)]) == 2
        assert "must be" in capsys.readouterr().err


def test_through_patch_on_load_and_the_command_line(tmp_path):
    with patch_on_load(tile=16) as reports:
        tiny_llama()
    assert [(entry.keep, entry.tile) for entry in reports[0]] == [(0, 16)] * 2
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))\n"
        f"open({str(out)!r}, 'w').write(str(type(model.model.layers[0].mlp)._swiglu_memory))\n"
    )
    assert main(["run", "--keep=0", "--tile=16", str(script)]) == 0
    assert out.read_text() == "keep=0, tile=16"
