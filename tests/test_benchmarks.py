"""The benchmarks: they measure what they say, refuse wrong results, and draw what was measured."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.kernel import needs_kernel
from support.models import tiny_llama

from benchmarks import charts, cli, contenders, kernels, long_sequences, mlps, result_rows, suite, whole_models
from hf_swiglu import patch_model
from hf_swiglu.commands.models import copy_sharing_parameters
from hf_swiglu.commands.timing import Ratio, Times, take_turns

# They time the kernel.
pytestmark = [pytest.mark.slow, needs_kernel]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SIZES", ((1, 64), (130, 128)))
    monkeypatch.setattr(mlps, "SIZES", {"small": (64, 256)})
    monkeypatch.setattr(mlps, "CPU_TOKENS", (1, 64))


@pytest.fixture
def written(small, tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    measured = suite.run_benchmarks(["kernel", "mlp"], seconds=0, file=file, command="a test", show=lambda line: None)
    return file, measured


def test_rows_say_what_was_measured_and_where(written):
    file, measured = written
    assert [json.loads(line) for line in file.read_text().splitlines()] == measured
    assert {row["level"] for row in measured} == {"kernel", "mlp"}
    cases = {(row["what"], row["dtype"], row["size"]) for row in measured if row["level"] == "kernel"}
    assert len(cases) == len(kernels.DIRECTIONS) * len(contenders.DTYPES) * 2
    for row in measured:
        assert row["torch"] == torch.__version__ and row["command"] == "a test" and row["device_type"] == "cpu"
        assert all(contender["us"] > 0 and contender["rounds"] >= 5 for contender in row["contenders"].values())
        assert {"eager", "ours"} <= row["contenders"].keys()
    trained = next(row for row in measured if row["what"] == "training")
    # Gate, up and two gradients of theirs, float32, are the least that a training step has alive.
    assert trained["contenders"]["eager"]["peak_bytes"] > trained["contenders"]["ours"]["peak_bytes"] > 4 * 64 * 256 * 4


@pytest.fixture
def tiny_model(monkeypatch):
    """A tiny LLaMA in place of SmolLM2."""
    monkeypatch.setattr(whole_models.models, "resolve", lambda given: given)
    monkeypatch.setattr(whole_models.models, "load", lambda source, device: (tiny_llama(), None))
    monkeypatch.setattr(whole_models, "sample_tokens", lambda tokenizer, device: torch.arange(3, 103).repeat(6)[None])


def test_rows_of_a_whole_model(tiny_model):
    measured = suite.run_benchmarks(["model"], seconds=0, show=lambda line: None)
    what = ["prefill, 1 x 512 tokens", "decode, 8 tokens after 32", "training, 2 x 256 tokens"]
    assert [(row["what"], row["dtype"]) for row in measured] == [(w, d) for d in ("float32", "bfloat16") for w in what]
    for row in measured:
        assert all(contender["rounds"] == 5 for contender in row["contenders"].values())
    training = measured[2]["contenders"]
    # Of each token and layer eager keeps two more tensors of the intermediate size.
    assert training["eager"]["peak_bytes"] - training["ours"]["peak_bytes"] > 0.9 * 2 * 512 * 320 * 4


def test_a_wrong_model_is_refused_not_timed(tiny_model, monkeypatch):
    monkeypatch.setattr(whole_models, "patch_model", lambda model: patch_model(model, activation="swiglu"))
    with pytest.raises(contenders.WrongResult, match="ours: logits differ"):
        suite.run_benchmarks(["model"], seconds=0, show=lambda line: None)


def test_a_wrong_result_is_refused_not_timed(small, monkeypatch):
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: F.gelu(gate) * up)
    with pytest.raises(contenders.WrongResult, match="ours: root mean square error"):
        suite.run_benchmarks(["kernel"], seconds=0, show=lambda line: None)


def test_of_others_only_the_wrong_ones_are_left_out(small):
    eager = mlps.LlamaMLP(mlps.LlamaConfig(hidden_size=64, intermediate_size=256))
    modules = mlps.contenders(eager, compile=False) | {
        "same": copy_sharing_parameters(eager),
        "wrong": copy_sharing_parameters(eager),
    }
    modules["wrong"].act_fn = torch.nn.GELU()
    with pytest.warns(UserWarning, match="not timed.*wrong: root mean square error"):
        mlps._check(modules, mlps._input(eager, 64))
    assert list(modules) == ["eager", "ours", "same"]
    modules["ours"] = copy_sharing_parameters(eager)
    modules["ours"].act_fn = torch.nn.GELU()
    with pytest.raises(contenders.WrongResult, match="ours: root mean square error"):
        mlps._check(modules, mlps._input(eager, 64))


def test_each_contender_has_a_turn_in_each_round():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(functions, 0, torch.device("cpu"))
    assert set(times) == {"a", "b"} and len(times["a"].rounds) == len(times["b"].rounds) == 5


def test_a_ratio_compares_turns_of_one_round():
    # The machine was ten times slower in the last two rounds.
    eager, ours = Times((4.0, 4.0, 40.0, 40.0)), Times((2.0, 2.0, 20.0, 20.0))
    assert Ratio.of(eager, ours).median == 2.0


def test_a_ratio_is_noise_if_1_lies_between_its_quartiles_or_rounds_are_few():
    assert Ratio((0.8, 0.9, 1.1, 1.2, 1.3)).is_noise and not Ratio((1.1, 1.2, 1.3, 1.4, 0.95)).is_noise
    assert Ratio((1.3, 1.4, 1.2)).is_noise and not Ratio((1.3, 1.4, 1.2, 1.1)).is_noise
    assert Ratio((0.9,)).is_noise and Ratio((0.9,)).rounds_won == 0


def test_a_turn_is_as_many_calls_as_asked_for():
    calls = []
    take_turns({"a": lambda: calls.append(1)}, 0, torch.device("cpu"), fewest_rounds=3, calls=2)
    assert len(calls) == 6


def test_plot_draws_a_chart_and_writes_the_tables(written, tmp_path):
    file, measured = written
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: kernel -->\nold\n<!-- end of table -->\nafter\n")
    (chart,) = charts.plot([file], folder=tmp_path / "charts", pages=[page])
    assert chart.name == "cpu.png" and chart.read_bytes().startswith(b"\x89PNG")
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    row = next(row for row in measured if (row["what"], row["dtype"]) == ("backward", "float16"))
    cells = next(line for line in lines if line.startswith("| backward | float16 | 1 x 64")).split(" | ")
    assert cells[5] == f"{row['contenders']['ours']['speedup']:.2f}x"


def test_the_last_row_of_a_case_counts(written):
    file, measured = written
    again = json.loads(json.dumps(measured[0]))
    again["contenders"]["eager"]["us"] = 1.5
    with file.open("a") as stream:
        stream.write(json.dumps(again) + "\n")
    found = result_rows.read([file])
    assert len(found) == len(measured) and found[-1]["contenders"]["eager"]["us"] == 1.5


def test_tables_are_of_the_machine_measured_last(written, tmp_path):
    file, measured = written
    older = [{**row, "kernel": "C kernel, of long ago"} for row in measured]
    file.write_text("".join(json.dumps(row) + "\n" for row in older + measured))
    assert len(result_rows.read([file])) == 2 * len(measured)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: kernel -->\n<!-- end of table -->\n")
    charts.plot([file], folder=tmp_path, pages=[page])
    assert "of long ago" not in page.read_text()
    assert page.read_text().count("| forward |") == sum(row["what"] == "forward" for row in measured)


def test_rows_of_long_sequences_become_a_picture_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(long_sequences, "LENGTHS", (512, 1024))
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    measured = suite.run_benchmarks(["long"], seconds=0, file=file, show=lambda line: None)
    for row in measured:
        peaks = [row["contenders"][name]["peak_bytes"] for name in ("eager", "keep=2", "keep=0", "tile=512")]
        assert list(row["contenders"]) == list(long_sequences.SETTINGS) and peaks == sorted(peaks, reverse=True)
    page.write_text("<!-- table: long -->\n<!-- end of table -->\n")
    drawn = charts.plot([file], folder=tmp_path, pages=[page])
    assert drawn[-1].name == "cpu_long_sequences.png" and drawn[-1].stat().st_size > 10_000
    assert "| 1 x 1024 |" in page.read_text()


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="no level galaxy; the levels are kernel, mlp, model, long"):
        suite.run_benchmarks(["galaxy"])


def test_an_unknown_level_is_a_usage_error(capsys):
    assert cli.main(["measure", "--level", "whole"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--level is kernel, mlp, model, long; got whole" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plot", "{folder}/absent.jsonl"], "absent.jsonl"),
        (["plot", "{folder}/empty.jsonl"], "no rows"),
        (["plot", "{folder}/prose.jsonl"], "line 1 is not a row"),
    ],
)
def test_failures_are_one_line(capsys, tmp_path, arguments, says):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "prose.jsonl").write_text("not JSON\n")
    assert cli.main([argument.format(folder=tmp_path) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
