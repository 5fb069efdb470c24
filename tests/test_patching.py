"""Fusing a loaded model: equal numbers, nothing changed that others can see, all of it or nothing, and undone."""

import copy

import pytest
import torch
from support.kernel import launched, needs_kernel
from support.models import GatedMLP, tiny_gemma, tiny_llama, tiny_phi3, tokens
from support.outcome import outcome
from torch import nn

from hf_swiglu import PatchReport, dispatch, patch_model, patch_on_load, unpatch_model
from hf_swiglu.patching import patch_model as patch
from hf_swiglu.patching.report import Entry
from hf_swiglu.patching.rewriting import fused_classes
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import assert_close, counted_launches, why_not_close

FAMILIES = pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])


def _first_mlp(model):
    return model.model.layers[0].mlp


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_of_the_whole_model_in_the_tolerance_of_eager(build, dtype):
    model = build().to(dtype)
    # Without a loss: its mean would make all gradients smaller than the absolute part of the tolerance.
    exact = outcome(copy.deepcopy(model).double(), input_ids=tokens())
    eager = outcome(model, input_ids=tokens())
    patch_model(model)
    with counted_launches() as launches:
        fused = outcome(model, input_ids=tokens())
    # keep=2 may run the product again on the way back.
    assert launches.names[:2] == launched("swiglu_fwd") * 2
    assert launches.names.count("swiglu_bwd") == len(launched("swiglu_bwd") * 2)
    assert_close(fused, eager, exact)
    # The rule tells GELU from swish in every tensor that the activation has a part in.
    geglu = outcome(build(hidden_act="gelu").to(dtype), input_ids=tokens())
    assert all(why_not_close(geglu[name], eager[name], exact[name]) for name in geglu)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_without_gradients_in_the_tolerance_of_eager(build, dtype):
    model = build().to(dtype)
    exact = outcome(copy.deepcopy(model).double(), input_ids=tokens(), differentiated=False)
    eager = outcome(model, input_ids=tokens(), differentiated=False)
    patch_model(model)
    with counted_launches() as launches:
        fused = outcome(model, input_ids=tokens(), differentiated=False)
    assert launches.names == launched("swiglu_fwd") * 2
    assert_close(fused, eager, exact)


@FAMILIES
def test_patching_twice_changes_nothing_and_says_so(build):
    model = build()
    patch_model(model)
    classes = [type(module) for module in model.modules()]
    report = patch_model(model)
    assert len(report.already_fused) == len(report) == 2
    assert "0 fused, 2 already fused" in str(report)
    assert [type(module) for module in model.modules()] == classes


@needs_kernel
def test_other_options_the_second_time_are_applied():
    def kept(model):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
            model.model.layers[0].mlp(torch.randn(200, 64, requires_grad=True))
        return len(seen)

    model, fresh = tiny_llama(), tiny_llama()
    patch_model(fresh, keep=3)
    with patch_on_load(strict=False):
        patch_model(model)
    before = kept(model)
    assert [entry.verdict for entry in patch_model(model, keep=3)] == ["fused"] * 2
    assert kept(model) == kept(fresh) > before
    assert [entry.verdict for entry in patch_model(model, keep=3)] == ["already fused"] * 2
    assert unpatch_model(model) == 2


def _footprint(model):
    """Classes, what the classes hold, and every module's own attributes."""
    return [(type(module), list(vars(type(module))), list(vars(module))) for module in model.modules()]


@FAMILIES
def test_undo_leaves_nothing_behind(build):
    model = build()
    before = _footprint(model)
    patch_model(model)
    assert _footprint(model) != before
    model(tokens())
    assert unpatch_model(model) == 2
    assert _footprint(model) == before
    assert unpatch_model(model) == 0
    with counted_launches() as launches:
        model(tokens())
    assert launches.names == []


def test_one_family_after_another_in_one_model():
    model = nn.ModuleDict({"llama": tiny_llama(), "phi": tiny_phi3(), "gemma": tiny_gemma()})
    report = patch_model(model)
    assert {entry.class_name: entry.verdict for entry in report} == {
        "LlamaMLP": "fused",
        "Phi3MLP": "fused",
        "GemmaMLP": "skipped",
    }
    assert unpatch_model(model) == 4


@pytest.mark.parametrize(
    "owner, name, verify",
    [
        (fused_classes, "fused_over", False),
        (fused_classes, "class_changes", False),
        (patch, "compare", True),
        (patch, "_planned", False),
    ],
)
def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch, owner, name, verify):
    model = nn.ModuleList([tiny_llama(), tiny_phi3()])
    before = _footprint(model)
    original, calls = getattr(owner, name), []

    def failing_the_third_time(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyError("half-way")
        return original(*args)

    monkeypatch.setattr(owner, name, failing_the_third_time)
    with pytest.raises(KeyError, match="half-way"):
        patch_model(model, verify=verify)
    assert _footprint(model) == before and len(calls) >= 3


@pytest.mark.parametrize(
    "only, fused",
    [
        ("LlamaMLP", ["0", "1"]),
        ("model.layers.0.*", ["0"]),
        (["model.layers.1.mlp"], ["1"]),
        (["*.0.mlp", "*.1.mlp"], ["0", "1"]),
    ],
)
def test_only(only, fused):
    model = tiny_llama()
    report = patch_model(model, only=only)
    assert [entry.name.split(".")[2] for entry in report] == fused
    assert [isinstance(layer.mlp, FusedModule) for layer in model.model.layers] == ["0" in fused, "1" in fused]


def test_only_that_matches_nothing_lists_the_classes():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'LamaMLP'.*LlamaForCausalLM.*LlamaAttention, .*LlamaMLP"):
        patch_model(model, only=["LlamaMLP", "LamaMLP"])
    assert not isinstance(_first_mlp(model), FusedModule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@FAMILIES
def test_verify_passes_where_nothing_is_wrong(build, dtype):
    assert len(patch_model(build().to(dtype), verify=True).fused) == 2


class WithDropout(GatedMLP):
    def forward(self, x):
        return self.w2(nn.functional.dropout(self.act(self.w1(x)) * self.w3(x), 0.5, self.training))


class WithScaledGate(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x) * 0.5) * self.w3(x).float())


@pytest.mark.parametrize("cls", [WithDropout, WithScaledGate])
def test_verify_in_training_mode_leaves_mode_and_random_state_alone(cls):
    model = nn.Sequential(cls()).train()
    state = torch.get_rng_state()
    assert len(patch_model(model, verify=True).fused) == 1
    assert model[0].training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_verify_finds_a_wrong_fusion_and_restores(monkeypatch, build):
    model = build()
    before = _footprint(model)

    original = fused_classes.fused_over

    def wrong(module, x):
        return fused_classes.original_class(type(module)).forward(module, x) * 1.01

    def broken(cls, *args):
        fused = original(cls, *args)
        return type(cls.__name__, (fused,), {"forward": wrong, "_swiglu_original": cls})

    monkeypatch.setattr(fused_classes, "fused_over", broken)
    with pytest.raises(RuntimeError, match=f"verify=True.*{type(_first_mlp(model)).__name__}"):
        patch_model(model, verify=True)
    assert _footprint(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_demands_equal_bits_in_16_bits(monkeypatch, dtype):
    model = nn.Sequential(GatedMLP()).to(dtype)

    def rounded_once(gate, up, params):
        return (nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    for name in ("swiglu", "swiglu_inplace"):
        monkeypatch.setattr(dispatch, name, rounded_once)
    with pytest.raises(RuntimeError, match=r"verify=True.*GatedMLP.*outputs in torch.*bits are to be equal"):
        patch_model(model, verify=True)


def test_verify_needs_weights():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        patch_model(model, verify=True)
    assert not isinstance(_first_mlp(model), FusedModule)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"patch_model: model must be a torch.nn.Module; got str"):
        patch_model("meta-llama/Llama-3")
    with pytest.raises(TypeError, match=r"unpatch_model: model must be a torch.nn.Module; got dict"):
        unpatch_model({})
    with pytest.raises(TypeError, match="stict"):
        patch_model(tiny_llama(), stict=False)


def test_the_report_is_a_text_and_a_sequence():
    model = nn.ModuleDict({"llama": tiny_llama(), "gemma": tiny_gemma()})
    report = patch_model(model)
    assert isinstance(report, PatchReport) and len(report) == 4
    assert report[0] == next(iter(report)) == report.fused[0]
    assert report[-1] in report.skipped and report[1:3] == tuple(report)[1:3]
    text = str(report)
    assert "2 fused, 0 already fused, 2 skipped" in text and "llama.model.layers.0.mlp ... " in text
    assert "2 x GemmaMLP" in text and "GELU" in text
    assert text in repr(report) and max(map(len, text.splitlines())) <= 80
    table = report._repr_html_()
    assert table.count("<tr>") == 3 and "llama.model.layers.0.mlp ... " in table and "GELUTanh" in table
    assert [entry["verdict"] for entry in report.to_json()] == ["fused"] * 2 + ["skipped"] * 2


def test_the_report_escapes_names_and_never_breaks_them():
    name = "layers.<0>." + "very_long_name." * 8 + "mlp"
    report = PatchReport([Entry(name, "MLP", "skipped", reason="its source is not available, " * 5)])
    lines = str(report).splitlines()
    assert lines[-1].strip() == name and all(len(line) <= 80 for line in lines[:-1])
    assert "layers.&lt;0&gt;" in report._repr_html_() and "<0>" not in report._repr_html_()
