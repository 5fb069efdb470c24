"""`hf-swiglu plan`: what it predicts from a config is what a training step takes."""

import json

import pytest
import torch
from support.models import SIZES
from support.packaged import needs_smollm2
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.utils.generic import maybe_autocast

from hf_swiglu import backends, patch_model
from hf_swiglu.commands import models
from hf_swiglu.commands.cli import main
from hf_swiglu.commands.models import ModelError
from hf_swiglu.commands.peak_memory import peak_bytes
from hf_swiglu.commands.plan import SETTINGS, plan_memory, read_bytes

try:
    # transformers' rotary embeddings call it; where it fails, `plan` ends with an error that says so.
    with maybe_autocast("meta", enabled=False):
        NO_META = None
except RuntimeError as error:
    NO_META = f"this transformers runs no model on the meta device with this torch: {error}"
needs_meta = pytest.mark.skipif(NO_META is not None, reason=str(NO_META))

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")

TOKENS = 1536
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES),
}


def measured(model, options, checkpointing, tokens):
    """Peak bytes of forward and backward on the CPU."""
    model.train()
    if checkpointing:
        models.enable_checkpointing(model)
    if options is not None:
        patch_model(model, strict=False, **options)
    ids = torch.zeros(1, tokens, dtype=torch.long)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return peak_bytes(step, torch.device("cpu"))


@needs_meta
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_prediction_is_what_a_step_takes(name, checkpointing, tmp_path):
    config = CONFIGS[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan = plan_memory(str(tmp_path), tokens=TOKENS, dtype="fp32", checkpointing=checkpointing)
    assert [row.setting for row in plan.rows] == [setting for setting, _ in SETTINGS]
    for row in plan.rows:
        model = AutoModelForCausalLM.from_config(config)
        expected = measured(model, row.options, checkpointing, TOKENS)
        predicted = row.peak_bytes - plan.weight_bytes - plan.optimizer_bytes
        assert predicted == pytest.approx(expected, rel=0.05), row.setting


@pytest.mark.long
@needs_smollm2
@needs_meta
def test_the_prediction_for_smollm2_is_what_a_step_takes():
    tokens = 128
    plan = plan_memory(models.PACKAGED, tokens=tokens, dtype="fp32")
    for row in (plan.rows[2], plan.rows[4]):
        model, _ = models.load(models.resolve(models.PACKAGED), torch.device("cpu"))
        expected = measured(model, row.options, False, tokens)
        predicted = row.peak_bytes - plan.weight_bytes - plan.optimizer_bytes
        assert predicted == pytest.approx(expected, rel=0.05), row.setting


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


@needs_meta
def test_what_mlps_keep_is_counted_in_buffers(folder):
    plan = plan_memory(folder, tokens=TOKENS, dtype="bf16")
    buffer = SIZES["num_hidden_layers"] * TOKENS * SIZES["intermediate_size"] * 2
    assert [row.mlp_bytes / buffer for row in plan.rows] == pytest.approx([4, 3, 2, 1, 0, 0], abs=0.01)
    assert [row.extra_percent > 0 for row in plan.rows] == [False, False, False, True, True, True]


@needs_meta
def test_the_first_setting_that_fits_is_proposed(folder):
    peaks = [row.peak_bytes for row in plan_memory(folder, tokens=TOKENS).rows]
    assert peaks == sorted(peaks, reverse=True)
    for at in (2, 3, 4):
        plan = plan_memory(folder, tokens=TOKENS, budget=f"{peaks[at]}B")
        assert plan.proposal == plan.rows[at] and [row.fits for row in plan.rows] == [p <= peaks[at] for p in peaks]
    assert plan_memory(folder, tokens=TOKENS, budget="1KB").proposal is None
    assert plan_memory(folder, tokens=TOKENS).proposal.setting == "keep=2"


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("500m", 500e6), ("1.5tb", 1.5e12), ("123 b", 123)]
)
def test_budgets_are_read(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24", "24XB", "-1GB", "24GBs", "24 i"])
def test_a_budget_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=r'such as "24GB".*got'):
        read_bytes(text)


@needs_meta
def test_the_command_says_what_to_call_and_when_no_setting_helps(folder, tmp_path, capsys):
    peak = plan_memory(folder, tokens=TOKENS).rows[4].peak_bytes
    assert main(["plan", folder, "--tokens", str(TOKENS), "--budget", f"{peak}B"]) == 0
    printed = capsys.readouterr().out
    assert "patch_model(model, keep=0)" in printed and "not in the MLPs" not in printed
    # The logits are wider than everything else together.
    wide = LlamaConfig(**SIZES | {"vocab_size": 50_000}, architectures=["LlamaForCausalLM"])
    wide.save_pretrained(tmp_path / "wide")
    assert main(["plan", str(tmp_path / "wide"), "--tokens", "512", "--checkpointing"]) == 0
    printed = capsys.readouterr().out
    assert "the peak is not in the MLPs" in printed and "0.10 GB" in printed


@needs_meta
def test_the_command_prints_a_table_or_json(folder, capsys):
    assert main(["plan", folder, "--tokens", "512", "--budget", "1GB"]) == 0
    assert "choose keep=2" in capsys.readouterr().out
    assert main(["plan", folder, "--tokens", "512", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["proposal"] == "keep=2" and printed["rows"][0]["setting"] == "unpatched"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--tokens", "8", "--dtype", "int8"], "dtype must be"),
        (["--tokens", "8", "--budget", "much"], "the budget must be"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, message):
    assert main(["plan", folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_without_a_gated_mlp_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="nothing to fuse in GPT2LMHeadModel"):
        plan_memory(str(tmp_path), tokens=64)
