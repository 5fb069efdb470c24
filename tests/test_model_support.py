"""tools/model_support: the scan finds products, the comparison fails on faults, and most classes here are fused."""

import multiprocessing
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaPreTrainedModel, MixtralConfig, Qwen2VLConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_swiglu import patch_model
from tools.model_support import comparison, meta_instances
from tools.model_support.gate_classification import classify_installed_transformers
from tools.model_support.not_mlp_gates import why_not_mlp_gate
from tools.model_support.page import DECLINED, FAILED, FUSED, NO_GATE, OTHER
from tools.model_support.small_configs import small_config
from tools.model_support.source_scan import scan, scan_sources

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "model-support.md"

# Every way in which modeling files write a gated product: the body of forward, and of __init__ where it matters.
GATED = {
    "in one line": "return self.down(self.act_fn(self.gate(x)) * self.up(x))",
    "the factors the other way round": "return self.up(x) * self.act_fn(self.gate(x))",
    "through variables": "g = self.gate(x)\na = self.act(g)\nu = self.up(x)\nreturn self.down(u * a)",
    "in place": "g = self.activation(self.gate(x))\ng *= self.up(x)\nreturn g",
    "a function": "return F.silu(self.gate(x)) * self.up(x)",
    "a function with its full name": "return torch.nn.functional.gelu(self.gate(x), approximate='tanh') * self.up(x)",
    "a tensor's method": "return self.gate(x).sigmoid() * self.up(x)",
    "torch.mul": "return torch.mul(self.act_fn(self.gate(x)), self.up(x))",
    "the method mul": "return self.up(x).mul(self.act_fn(self.gate(x)))",
    "packed, chunk": "g, u = self.gate_up(x).chunk(2, dim=-1)\nreturn self.activation_fn(g) * u",
    "packed, one name": "h = self.gate_up(x).chunk(2, -1)\nreturn self.act(h[0]) * h[1]",
    "packed, slices": "h = self.gate_up(x)\nreturn self.act(h[..., : self.n]) * h[..., self.n :]",
    "packed, a view": "h = self.gate_up(x).view(2, -1)\nreturn self.glu_act(h[..., 0, :]) * h[..., 1, :]",
    "interleaved": "h = self.gate_up(x)\nreturn self.act_fn(h[..., ::2]) * h[..., 1::2]",
    "clamped": "g = self.act_fn(self.gate(x).clamp(max=7)).clamp(max=9)\nreturn g * self.up(x).clamp(-7, 7)",
    "swish written out": "g = self.gate(x)\nglu = g * torch.sigmoid(g * self.alpha)\nreturn (self.up(x) + 1) * glu",
    "cast": "return (self.act_fn(self.gate(x).float()) * self.up(x).float()).to(x.dtype)",
    "dropout and a norm between": "a = self.dropout(self.act(self.gate(x)))\nreturn self.norm(a) * self.up(x)",
    "in one branch": "if self.gated:\n    x = self.act(self.gate(x)) * self.up(x)\nreturn x",
    "in a loop over experts": "for i in hit:\n    g, u = F.linear(x, self.w[i]).chunk(2, -1)\n    y = self.act(g) * u",
    "GLU in one call": "return nn.functional.glu(self.gate_up(x), dim=-1)",
    "an activation of two tensors": "return self.down(self.act_fn(self.gate(x), self.up(x)))",
    "a local function": "act = ACT2FN[self.config.hidden_act]\nreturn act(self.gate(x)) * self.up(x)",
    "looked up in the call": "return self.up(x) * ACT2FN[self.name](self.gate(x))",
    "another name": "return self.phi(self.gate(x)) * self.up(x)",
    "a sequence": "return self.squash(x) * x",
}
NOT_GATED = {
    "a plain MLP": "return self.fc2(self.act(self.fc1(x)))",
    "a number": "return 2 * self.act(self.fc1(x))",
    "projected before it is multiplied": "h = self.fc2(self.act(self.fc1(x)))\nreturn h * self.up(x)",
    "no activation": "return self.gate(x) * self.up(x)",
    "reassigned": "h = self.act(x)\nh = self.fc2(x)\nreturn h * self.up(x)",
}
CLASS = """
class Model(nn.Module):
    def __init__(self):
        self.phi = ACT2FN["silu"]
        self.squash = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x, hit=()):
"""


def found_in(source):
    return {name for _, name in scan_sources({"transformers.models.m.modeling_m": source})}


@pytest.mark.parametrize("form", GATED)
def test_scan_finds(form):
    assert found_in(CLASS + indented(GATED[form])) == {"Model"}


@pytest.mark.parametrize("form", NOT_GATED)
def test_scan_leaves_out(form):
    assert found_in(CLASS + indented(NOT_GATED[form])) == set()


def indented(body):
    return "\n".join(" " * 8 + line for line in body.splitlines())


def test_scan_finds_experts():
    body = "class Experts(nn.Module):\n    def forward(self, x):\n        return x\n"
    assert found_in("@use_experts_implementation\n" + body) == {"Experts"}
    assert found_in("@use_experts_implementation(is_transposed=True)\n" + body) == {"Experts"}
    assert found_in("@use_experts_implementation(has_gate=False)\n" + body) == set()
    assert found_in("class A(nn.Module):\n    def _apply_gate(self, h):\n        return helper(h)\n") == {"A"}


def test_scan_finds_products_in_functions_and_base_classes():
    source = (
        "def gated(g, u):\n    return F.silu(g) * u\n"
        "class A(nn.Module):\n    def forward(self, x):\n        return gated(self.gate(x), self.up(x))\n"
        "class B(A):\n    pass\n"
        "class C(A):\n    def forward(self, x):\n        return x\n"
    )
    assert found_in(source) == {"A", "B"}
    other = "from ..m.modeling_m import A as Base\nclass D(Base):\n    pass\n"
    keys = scan_sources({"transformers.models.m.modeling_m": source, "transformers.models.n.modeling_n": other})
    assert ("transformers.models.n.modeling_n", "D") in keys


def test_rules_leave_gated_mlps_in():
    for form, body in GATED.items():
        for name in ("Model", "ModelMLP", "ModelExperts"):
            ((_, entry),) = scan_sources({"transformers.models.m.modeling_m": CLASS + indented(body)}).items()
            assert why_not_mlp_gate(name, entry.products) is None, (form, name)


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("ModelAttention", "y = attn_output * torch.sigmoid(gate)", "an output gate of attention"),
        ("ModelTopkRouter", "y = router_logits.sigmoid() * topk_weights", "a weight of experts or of their scores"),
        ("ModelRMSNormGated", "y = hidden_states * F.silu(gate)", "the gate of a norm"),
        ("ModelForCausalLM", "y = torch.tanh(logits / softcap) * softcap", "a soft cap of logits"),
        ("Model", "y = hidden_states * torch.sigmoid(hidden_states)", "swish written out"),
        ("Model", "y = self.act(x) * padding_mask", "a product with a mask"),
    ],
)
def test_rules_name_what_is_no_mlp_gate(name, body, reason):
    ((_, entry),) = scan_sources({"transformers.models.m.modeling_m": CLASS + indented(body)}).items()
    assert why_not_mlp_gate(name, entry.products).startswith(reason)


def test_one_gate_among_other_products_keeps_a_class_in():
    body = "y = attn_output * torch.sigmoid(gate)\nreturn self.act(self.gate(x)) * self.up(x)"
    ((_, entry),) = scan_sources({"transformers.models.m.modeling_m": CLASS + indented(body)}).items()
    assert why_not_mlp_gate("ModelMLP", entry.products) is None


def instance(cls, config):
    with torch.device("meta"):
        return meta_instances.Instance(cls(config), (config,))


def mlp_instance():
    return instance(LlamaMLP, LlamaConfig(hidden_size=512, intermediate_size=1024))


def test_comparison_accepts_what_is_right():
    assert comparison.why_different(mlp_instance()) is None
    assert comparison.why_different(instance(MixtralExperts, MixtralConfig(hidden_size=512))) is None


def test_comparison_refuses_another_activation(monkeypatch):
    monkeypatch.setattr(comparison, "patch_model", after_patching(lambda module: setattr(module, "act_fn", nn.GELU())))
    monkeypatch.setattr(comparison.backends, "unavailable", lambda device: "no kernel runs for GELU")
    assert "against float64" in comparison.why_different(mlp_instance())


def test_comparison_refuses_wrong_gradients(monkeypatch):
    def spoil(module):
        module.up_proj.weight.register_hook(lambda grad: grad * 1.001)

    monkeypatch.setattr(comparison, "patch_model", after_patching(spoil))
    assert "the gradient of up_proj.weight: error" in comparison.why_different(mlp_instance())


def after_patching(change):
    """`patch_model`, and then something that makes the fused module wrong."""

    def patch(module, **options):
        report = patch_model(module, **options)
        change(module)
        return report

    return patch


@pytest.mark.skipif(comparison.backends.unavailable("cpu") is not None, reason="no kernel was built for this processor")
def test_comparison_refuses_a_fusion_that_runs_no_kernel(monkeypatch):
    monkeypatch.setattr(comparison, "patch_model", lambda module, strict: types.SimpleNamespace(fused=[module]))
    assert comparison.why_different(mlp_instance()) == "no kernel ran under eager"


def test_a_model_that_cannot_be_built_is_noted_and_passed_over(monkeypatch):
    monkeypatch.setattr(meta_instances, "CONFIG_MAPPING_NAMES", {"llama": "LlamaConfig", "mixtral": "MixtralConfig"})
    build = meta_instances._build

    def failing(built, cls):
        if cls.__name__ == "LlamaModel":
            raise RuntimeError("cannot be built")
        build(built, cls)

    monkeypatch.setattr(meta_instances, "_build", failing)
    meta_instances._models_by_config.cache_clear()
    built = meta_instances.build_instances({MixtralExperts})
    assert built.unbuilt_types == {"llama": "RuntimeError: cannot be built"}
    assert MixtralExperts in built.by_class
    assert "__init__" in vars(MixtralExperts)
    assert not hasattr(built.by_class[MixtralExperts].module, meta_instances._ARGUMENTS)


def test_a_part_of_a_model_that_fails_later_is_kept(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cannot be finished")

    monkeypatch.setattr(meta_instances, "CONFIG_MAPPING_NAMES", {"llama": "LlamaConfig"})
    monkeypatch.setattr(meta_instances, "_build_alone", fail)
    monkeypatch.setattr(LlamaPreTrainedModel, "post_init", fail)
    built = meta_instances.build_instances({LlamaMLP})
    assert built.unbuilt_types == {"llama": "RuntimeError: cannot be finished"}
    assert isinstance(built.by_class[LlamaMLP].args[0], LlamaConfig)


def test_small_configs_have_few_layers_and_every_part():
    assert small_config(LlamaConfig).num_hidden_layers == 4
    assert {"text_config", "vision_config"} <= vars(small_config(Qwen2VLConfig)).keys()


@pytest.fixture(scope="module")
def both():
    """The status of every class, and a scan in this process."""
    # In another process: importing all of transformers makes every later trace of the process slower.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        future = process.submit(classify_installed_transformers)
        return future, scan()


@pytest.fixture
def support(both):
    return both[0].result()


def test_no_class_failed(support):
    assert [(row.name, row.reason) for row in support.rows if row.status == FAILED] == []


def test_every_class_of_the_scan_has_a_status(both, support):
    rows = sorted((row.family, row.name) for row in support.rows)
    assert rows == sorted((entry.family, entry.name) for entry in both[1].values())
    assert sum(support.totals.values()) == len(support.rows) > 250
    assert all(row.reason for row in support.rows if row.status in (DECLINED, OTHER, NO_GATE))


def test_scan_misses_nothing_that_recognition_finds(support):
    assert support.missed_by_scan == ()


def test_at_least_95_percent_of_the_silu_gated_classes_are_fused(support):
    assert support.fused_share >= 0.95


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("LlamaMLP", "separate", FUSED),
        ("Phi3MLP", "packed", FUSED),
        ("MixtralExperts", "experts", FUSED),
        ("GptOssExperts", "experts", FUSED),
        ("JetMoeMoE", "packed", FUSED),
        ("GemmaMLP", "separate", OTHER),
        ("T5DenseGatedActDense", "separate", OTHER),
        ("Qwen3NextAttention", "separate", NO_GATE),
    ],
)
def test_status_of_known_classes(support, name, kind, status):
    (row,) = [row for row in support.rows if row.name == name]
    assert (row.status, row.kind if status != NO_GATE else kind) == (status, kind)


def test_page_is_up_to_date(support):
    page = PAGE.read_text(encoding="utf-8")
    if f"- transformers {transformers.__version__}:" not in page:
        pytest.skip(f"docs/model-support.md is about another transformers than {transformers.__version__}")
    assert page == support.to_markdown(), "run `make coverage`"
