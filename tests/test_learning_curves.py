"""examples/from_scratch.py and examples/swap_and_recover.py, and the tables of docs/training.md."""

import json
from pathlib import Path

import pytest
import torch
from test_finetune import finetune, write_text, write_tiny_model
from test_training import example
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "training.md"
RESULTS = ROOT / "benchmarks" / "results"


def cells(printed: str) -> list[list[str]]:
    """The lines of a printed table, without its head."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.long
def test_from_scratch(tmp_path, capsys):
    text, picture, rows = write_text(tmp_path / "text.txt"), tmp_path / "curves.png", tmp_path / "rows.jsonl"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- from_scratch -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--text", str(text), "--steps", "2", "--seeds", "0", "1", "--out", str(picture), "--rows", str(rows)]
    example("from_scratch").main([*arguments, "--page", str(page)])
    output = capsys.readouterr().out
    printed = {row[0]: row[1:] for row in cells(output)}
    table = output[output.index("|") : output.rindex("|") + 2]
    assert page.read_text() == f"before\n<!-- from_scratch -->\n{table}<!-- end -->\nafter\n"
    assert list(printed) == ["swiglu", "silu", "gelu", "relu"]
    runs = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(runs) == 8 and len({run["loss"][-1] for run in runs}) == 8
    for name, (lr, seeds, _, last, *_) in printed.items():
        losses = [run["loss"][-1] for run in runs if run["name"] == name]
        assert (lr, seeds) == ("0.002", "2") and max(losses) < 5.6
        assert last == f"{sum(losses) / 2:.3f} ({min(losses):.3f} to {max(losses):.3f})"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_swap_and_recover(tmp_path, capsys):
    script = example("swap_and_recover")
    model, text = write_tiny_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    picture, rows = tmp_path / "curves.png", tmp_path / "rows.jsonl"
    options = ["--model", str(model), "--text", str(text), "--out", str(picture), "--rows", str(rows)]
    script.main([*options, "--steps", "2", "--every", "1", "--block", "64", "--lr", "0.003"])
    swapped, unswapped = (json.loads(line) for line in rows.read_text().splitlines())
    assert (swapped["name"], unswapped["name"]) == ("swapped", "unswapped")
    for run in (swapped, unswapped):
        assert run["step"] == [0, 1, 2]
        assert run["perplexity"][2] < run["perplexity"][1] < run["perplexity"][0]
    # bfloat16: fusing changes no bit, swapping does.
    assert unswapped["original"] == swapped["original"]
    assert unswapped["perplexity"][0] == unswapped["original"]["perplexity"] != swapped["perplexity"][0]
    assert unswapped["token_frequencies"] == swapped["token_frequencies"] < 245 / 4
    # The swapped model is the one that the config's "swiglu" builds.
    tokenizer = AutoTokenizer.from_pretrained(model)
    _, held_out = finetune.split(finetune.pack([text.read_text()], tokenizer, 64), finetune.parse([]), 1)
    built = AutoModelForCausalLM.from_pretrained(model, hidden_act="swiglu", dtype=torch.float32)
    assert script.evaluate(built, held_out)["perplexity"] == swapped["perplexity"][0]
    printed = cells(capsys.readouterr().out)
    assert [row[:2] for row in printed] == [["swapped, lr 0.003", "1"], ["unswapped, lr 0.003", "1"]]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, file", [("from_scratch", "activations.jsonl"), ("swap_and_recover", "swaps.jsonl")])
def test_the_page_has_the_table_of_the_committed_rows(name, file):
    rows = example("learning_curves").read_rows(RESULTS / file)
    assert f"<!-- {name} -->\n{example(name).table(rows)}<!-- end -->" in PAGE.read_text(encoding="utf-8")
