"""Two processes compute what one does: every launch configuration of examples/, and tensor parallelism, over gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from packaging.version import Version
from support.kernel import launched
from support.models import tiny_llama, tokens
from support.outcome import outcome
from support.processes import free_port, tensor_parallel
from test_finetune import ROOT, SCRIPT, finetune, rows, write_text, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_swiglu import patch_model, patch_on_load
from hf_swiglu.patching.rewriting.fused_classes import FusedModule
from hf_swiglu.testing import counted_launches

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo"),
]

of_newer_accelerate = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate 1.8 continues FSDP2 without the optimizer, and evaluates LoRA otherwise, unpatched as well",
)
CONFIGS = ROOT / "examples" / "configs"

# accelerate 1.15 ignores FSDP and DeepSpeed on CPUs, and trains with DDP instead, without a warning. With GPUs in its
# state it wraps the model as configured, on CPUs. The driver prints the classes of the wrapped model, and whether a
# kernel ran.
DRIVER = """
import os, runpy, sys
from accelerate import Accelerator, DistributedType, PartialState
from hf_swiglu.testing import counted_launches

PartialState(cpu=True)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    from deepspeed import comm
    comm.init_distributed("gloo", auto_mpi_discovery=False)
if {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & os.environ.keys():
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    del os.environ["ACCELERATE_USE_CPU"]

prepare = Accelerator.prepare

def show(self, *args):
    model, optimizer = prepare(self, *args)
    print("prepared", *sorted({cls.__name__ for module in model.modules() for cls in type(module).__mro__}))
    return model, optimizer

Accelerator.prepare = show
sys.argv = sys.argv[1:]
with counted_launches() as launches:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("the kernel ran" if launches else "no kernel ran")
"""

# The second process dies in its fourth backward, after the checkpoint of two steps and before that of four.
DEATH = """
import os, signal
from accelerate import Accelerator

backward, calls = Accelerator.backward, []

def die(self, loss):
    calls.append(loss)
    if self.process_index == 1 and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    backward(self, loss)

Accelerator.backward = die
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return [
        *("--model", write_tiny_model(folder / "model"), "--text", write_text(folder / "text.txt")),
        *("--block", "64", "--steps", "6", "--save-every", "2", "--lr", "0.003"),
    ]


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    """The losses of one process, by its options."""
    known = {}

    def losses(*options):
        if options not in known:
            out = tmp_path_factory.mktemp("one") / "out"
            assert finetune.main(list(map(str, [*arguments, *options, "--batch", "4", "--out", out]))) == 0
            AcceleratorState._reset_state(reset_partial_state=True)
            known[options] = rows(out)
        return known[options]

    return losses


def launch(config: str, arguments, out: Path, *options) -> str:
    result = run_program(DRIVER, config, arguments, out, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FusedModule" in result.stdout, result.stdout
    assert result.stdout.count("the kernel ran") == len(launched("swiglu_fwd") * 2), result.stdout
    return result.stdout


def run_program(program: str, config: str, arguments, out: Path, *options) -> subprocess.CompletedProcess:
    driver = out.parent / "driver.py"
    driver.write_text(program)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Also where DeepSpeed would find a GPU.
    environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    script = [driver, SCRIPT, *arguments, "--batch", "2", "--out", out, *options]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), *script]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


def assert_same_curve(two, one):
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for ours, expected in zip(two, one, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)


def reloaded_perplexity(out: Path, arguments) -> float:
    """Of what was saved, in one process, without the plugin."""
    folder = out / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not any(isinstance(module, FusedModule) for module in model.modules())
    blocks = finetune.pack([arguments[3].read_text()], tokenizer, 64)
    _, held_out = finetune.split(blocks, finetune.parse([]), 2)
    assert len(held_out) % 2 == 0, "each process has as many, and none is left out"
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.exp().item()


def test_ddp(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    assert "DistributedDataParallel" in launch("ddp.yaml", arguments, out)
    assert_same_curve(rows(out), one_process())


def test_a_process_that_dies_ends_the_run_which_then_continues(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    result = run_program(DEATH + DRIVER, "ddp.yaml", arguments, out)
    assert result.returncode != 0 and "SIGKILL" in result.stderr, result.stderr
    assert [row["step"] for row in rows(out)][-1] == 3
    assert "continuing from" in launch("ddp.yaml", arguments, out, "--resume")
    assert_same_curve(rows(out), one_process())


@of_newer_accelerate
def test_fsdp2_and_its_checkpoints(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    printed = launch("fsdp2.yaml", arguments, out)
    assert "FSDPModule" in printed and "CheckpointWrapper" not in printed
    assert_same_curve(rows(out), one_process())
    assert reloaded_perplexity(out, arguments) == pytest.approx(rows(out)[-1]["perplexity"], rel=1e-5)
    shard = next((out / "checkpoint-000006").rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    printed = launch("fsdp2.yaml", arguments, out, "--resume")
    assert "checkpoint-000006 is incomplete" in printed and "continuing from" in printed
    assert_same_curve(rows(out), one_process())


def test_fsdp2_with_activation_checkpointing(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    printed = launch("fsdp2_checkpointing.yaml", arguments, out)
    assert "FSDPModule" in printed and "CheckpointWrapper" in printed
    assert_same_curve(rows(out), one_process())
    assert reloaded_perplexity(out, arguments) == pytest.approx(rows(out)[-1]["perplexity"], rel=1e-5)


@of_newer_accelerate
def test_fsdp2_with_lora(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    printed = launch("fsdp2.yaml", arguments, out, "--lora", "4")
    assert "FSDPModule" in printed and "LoraLayer" in printed
    assert_same_curve(rows(out), one_process("--lora", "4"))
    base = AutoModelForCausalLM.from_pretrained(arguments[1])
    trained = peft.PeftModel.from_pretrained(base, out / "model")
    assert any(parameter.abs().sum() > 0 for name, parameter in trained.named_parameters() if "lora_B" in name)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed"
)
@pytest.mark.parametrize("options", [(), ("--tile", "16")], ids=str)
def test_deepspeed_zero3(arguments, one_process, tmp_path, options):
    out = tmp_path / "out"
    assert "DeepSpeedEngine" in launch("zero3.yaml", arguments, out, *options)
    assert_same_curve(rows(out), one_process())
    assert reloaded_perplexity(out, arguments) == pytest.approx(rows(out)[-1]["perplexity"], rel=1e-5)


def tensor_parallel_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    expected = outcome(LlamaForCausalLM.from_pretrained(folder).train(), input_ids=tokens(), labels=tokens())
    after = LlamaForCausalLM.from_pretrained(folder, **tensor_parallel())
    patch_model(after)
    with patch_on_load():
        while_loading = LlamaForCausalLM.from_pretrained(folder, **tensor_parallel())
    for model in (after, while_loading):
        assert model.model.layers[0].mlp.gate_proj.weight.to_local().shape[0] * 2 == model.config.intermediate_size
        with counted_launches() as launches:
            result = outcome(model.train(), input_ids=tokens(), labels=tokens())
        # The down projection saves a DTensor, whose product is computed again on the way back: two buffers here too.
        assert launches.names == launched("swiglu_fwd") * 2 + launched("swiglu_fwd", "swiglu_bwd") * 2
        torch.testing.assert_close(result, expected)
    dist.destroy_process_group()


def test_tensor_parallel_forward_and_training_step(tmp_path):
    # Each process has half of the intermediate features, and must still reach the kernel.
    tiny_llama(intermediate_size=2048).save_pretrained(tmp_path)
    torch.multiprocessing.spawn(tensor_parallel_rank, (free_port(), str(tmp_path)), nprocs=2)
