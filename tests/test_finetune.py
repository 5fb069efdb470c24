"""examples/finetune.py: it learns, it goes on where it stopped, and it refuses what cannot work in one line."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from support.models import tiny_llama
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_swiglu.patching.rewriting.fused_classes import FusedModule

pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
specification = importlib.util.spec_from_file_location("finetune", SCRIPT)
finetune = importlib.util.module_from_spec(specification)
specification.loader.exec_module(finetune)


def write_tiny_model(folder: Path) -> Path:
    """A tiny LLaMA whose tokens are bytes, wide enough for the kernel to run with 128 tokens in another process."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    tiny_llama(vocab_size=len(alphabet) + 1, intermediate_size=1024).save_pretrained(folder)
    return folder


def write_text(file: Path) -> Path:
    words = ["wherefore", "art", "thou", "gate", "and", "up", "and", "down"]
    file.write_text(" ".join(random.Random(0).choices(words, k=4200)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def arguments(model, text, tmp_path):
    return [
        *("--model", model, "--text", text, "--out", tmp_path / "out", "--lr", "0.003"),
        *("--block", "64", "--batch", "4", "--steps", "30", "--save-every", "5"),
    ]


def run(arguments, *more) -> int:
    return finetune.main(list(map(str, [*arguments, *more])))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_run_learns_and_writes_a_model_that_needs_no_plugin(arguments, text, tmp_path):
    out = tmp_path / "out"
    assert run(arguments) == 0
    losses = rows(out)
    assert [row["step"] for row in losses] == list(range(1, 31))
    assert losses[-1]["loss"] < losses[0]["loss"] - 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model" / "model.safetensors").exists()
    # The perplexity of what was saved, computed here and unpatched, is the one that the run logged.
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    assert not any(isinstance(module, FusedModule) for module in saved.modules())
    blocks = finetune.pack([text.read_text()], tokenizer, 64)
    _, held_out = finetune.split(blocks, finetune.parse([]), 1)
    with torch.no_grad():
        loss = saved(input_ids=held_out, labels=held_out).loss
    assert loss.exp().item() == pytest.approx(losses[-1]["perplexity"], rel=1e-5)


def test_patched_and_unpatched_runs_are_the_same_curve(arguments, tmp_path, capsys):
    assert run(arguments, "--no-patch", "--out", tmp_path / "eager") == 0
    assert "fused" not in capsys.readouterr().out
    assert run(arguments, "--compare", tmp_path / "eager") == 0
    assert "2 fused" in capsys.readouterr().out
    eager, patched = ([row["loss"] for row in rows(tmp_path / name)] for name in ("eager", "out"))
    assert patched == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("options", [["--lora", "4"], ["--checkpointing"], ["--precision", "bf16"]], ids=" ".join)
def test_options(options, arguments, tmp_path):
    assert run(arguments, *options, "--steps", "10") == 0
    losses = [row["loss"] for row in rows(tmp_path / "out")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists() == ("--lora" in options)


def test_accumulation_is_a_larger_batch(arguments, tmp_path):
    assert run(arguments, "--steps", "10") == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(arguments, "--steps", "10", "--batch", "2", "--accumulate", "2", "--out", tmp_path / "two") == 0
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("out", "two"))
    assert two == pytest.approx(one, rel=1e-4)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(arguments, tmp_path, capsys):
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    arguments = [*arguments, "--steps", "60", "--lora", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, *map(str, arguments), "--out", killed]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = killed / "losses.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 12):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(log.read_text().splitlines())
    assert 12 < before < 60
    assert run(arguments, "--out", killed, "--resume") == 0
    assert "continuing from" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(arguments, "--out", unbroken) == 0
    assert [row["step"] for row in rows(killed)] == list(range(1, 61))
    for resumed, expected in zip(rows(killed), rows(unbroken), strict=True):
        assert resumed == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_that_was_cut_short_is_not_used(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*arguments, "--steps", "10"]
    assert run(arguments) == 0
    expected = rows(out)
    weights = out / "checkpoint-000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    # As a run that was killed while it wrote would leave it: no list of files yet.
    (out / "checkpoint-000011").mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(arguments, "--resume") == 0
    printed = capsys.readouterr().out
    assert "checkpoint-000011 is incomplete" in printed and "checkpoint-000010 is incomplete" in printed
    assert "continuing from" in printed and "checkpoint-000005" in printed
    assert rows(out) == expected


def test_resuming_without_any_checkpoint_begins_anew(arguments, tmp_path, capsys):
    assert run(arguments, "--steps", "2", "--resume") == 0
    assert "no complete checkpoint" in capsys.readouterr().out
    assert len(rows(tmp_path / "out")) == 2


def nothing(folder):
    return ["--text", folder / "nothing.txt"]


def empty_file(folder):
    (folder / "empty.txt").write_text(" \n")
    return ["--text", folder / "empty.txt"]


def folder_without_text(folder):
    (folder / "folder").mkdir()
    return ["--text", folder / "folder"]


def no_text_at_all(folder):
    (folder / "image.txt").write_bytes(b"\xff\xd8\xff\xe0")
    return ["--text", folder / "image.txt"]


def unknown_model(folder):
    return ["--model", folder / "nowhere"]


def no_model_in_the_folder(folder):
    return ["--model", folder]


def block_beyond_the_context(folder):
    return ["--block", "4096"]


def batch_beyond_the_text(folder):
    return ["--batch", "1000"]


def folder_below_a_file(folder):
    (folder / "file").write_text("")
    return ["--out", folder / "file" / "out"]


def comparison_with_nothing(folder):
    return ["--compare", folder]


BAD = {
    nothing: "does not exist",
    empty_file: "there is no text in",
    folder_without_text: "there is no text in",
    no_text_at_all: "cannot read the text",
    unknown_model: "nowhere",
    no_model_in_the_folder: "cannot load",
    block_beyond_the_context: "longer than the 2048 tokens that",
    batch_beyond_the_text: "smaller --batch",
    folder_below_a_file: "is not a folder that you may write to",
    comparison_with_nothing: "no losses.jsonl",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_input_gets_one_line_and_writes_nothing(bad, arguments, tmp_path, capsys):
    options = bad(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(arguments, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("finetune: ") and error.count("\n") == 1 and BAD[bad] in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_processes_that_would_train_alone_are_refused(arguments, tmp_path, monkeypatch, capsys):
    # As a launcher starts them on a machine without GPUs, where accelerate does not join them.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(arguments) == 1
    assert "2 processes were started, and each would train alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten(arguments, tmp_path, capsys):
    assert run(arguments, "--steps", "2") == 0
    written = rows(tmp_path / "out")
    assert run(arguments, "--steps", "2") == 1
    assert "--resume" in capsys.readouterr().err
    assert rows(tmp_path / "out") == written


def test_a_number_that_makes_no_sense_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as stopped:
        run(arguments, "--steps", "0")
    assert stopped.value.code == 2
