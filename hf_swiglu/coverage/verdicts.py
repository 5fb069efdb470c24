"""The census: what becomes of every class of the source scan."""

from __future__ import annotations

import contextlib
import dis
import gc
import operator
import sys
import types
import warnings
from collections.abc import Container, Iterator

import torch
import transformers
from torch import nn

from hf_swiglu.coverage.comparison import NoComparison, why_different
from hf_swiglu.coverage.page import DECLINED, FAILED, FUSED, NO_GATE, OTHER, Census, Row
from hf_swiglu.coverage.rules import why_no_mlp_gate
from hf_swiglu.coverage.scan import ScannedClass, scan
from hf_swiglu.coverage.zoo import Specimen, Zoo, build_zoo, import_modeling_files
from hf_swiglu.patching.recognition import Found
from hf_swiglu.patching.survey import survey

# The gated linear unit of Dauphin et al. (2016), in one call of PyTorch's.
_GLU = "sigmoid (GLU)"


def census() -> Census:
    """Scans, builds and compares everything in the installed transformers; a minute or two.

    Example:
        >>> from hf_swiglu.coverage import census
        >>> census().totals["failed"]  # doctest: +SKIP
        0
    """
    with _quiet_and_quick():
        return _census()


@contextlib.contextmanager
def _quiet_and_quick() -> Iterator[None]:
    verbosity, threads, collecting = transformers.logging.get_verbosity(), torch.get_num_threads(), gc.isenabled()
    # The comparisons are small, and waking a second thread takes longer than what it would do.
    torch.set_num_threads(1)
    # Syntax trees and models are many objects, and all of them live to the end: collecting halves the scan's speed.
    gc.disable()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Warnings about what is missing for models that are only built, never run.
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def _census() -> Census:
    scanned = scan()
    failures = import_modeling_files()
    classes = {cls: entry for entry in scanned.values() if (cls := _class_of(entry)) is not None}
    zoo = build_zoo(classes)
    found = _surveyed(zoo, classes)
    by_key = {entry.key: cls for cls, entry in classes.items()}
    rows = [_row(entry, by_key.get(key), zoo, found) for key, entry in scanned.items()]
    missed = [
        f"{cls.__module__.split('.')[-2]}.{cls.__name__}"
        for cls, result in found.items()
        if cls not in classes and result.choices
    ]
    return Census(
        transformers.__version__,
        tuple(sorted(rows, key=lambda row: (row.family, row.name))),
        tuple(sorted(missed)),
        dict(sorted({**failures, **zoo.unbuilt_types}.items())),
        zoo.model_types,
    )


def _class_of(entry: ScannedClass) -> type[nn.Module] | None:
    cls = getattr(sys.modules.get(entry.module), entry.name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None


def _surveyed(zoo: Zoo, classes: Container[type[nn.Module]]) -> dict[type[nn.Module], Found]:
    """What recognition finds in the classes of the scan, and in every other that multiplies anything at all."""
    specimens = [
        ("", specimen.module)
        for cls, specimen in zoo.specimens.items()
        if cls in classes or (cls.__module__.startswith("transformers.models.") and _multiplies(cls))
    ]
    return {type(module): result for _, module, result in survey(specimens)}


def _multiplies(cls: type[nn.Module]) -> bool:
    functions = [function for function in vars(cls).values() if isinstance(function, types.FunctionType)]
    return any(
        instruction.argrepr in ("*", "*=") or instruction.argval in ("mul", "multiply", "mul_")
        for function in functions
        for instruction in dis.get_instructions(function)
    )


def _row(entry: ScannedClass, cls: type[nn.Module] | None, zoo: Zoo, found: dict[type, Found]) -> Row:
    specimen = zoo.specimens.get(cls) if cls is not None else None
    result = found.get(cls) if cls is not None else None
    activation = _activation(entry, specimen)
    verdict, reason = _verdict(entry, specimen, result, activation)
    if result is not None and result.choices:
        activation = result.activation
    return Row(entry.family, entry.name, _kind(entry, result), activation, verdict, reason)


def _verdict(entry: ScannedClass, specimen: Specimen | None, result: Found | None, activation: str) -> tuple[str, str]:
    no_gate = why_no_mlp_gate(entry.name, entry.products)
    if result is not None and result.choices:
        return _compared(specimen, no_gate)
    if no_gate is not None:
        return NO_GATE, no_gate
    if specimen is None:
        return FAILED, "no model is built with it, and it could not be built by itself"
    if not _is_silu(activation):
        return OTHER, f"its gate's activation is {activation}"
    if result is not None:
        return DECLINED, result.reason
    return FAILED, "nothing in it was recognised"


def _compared(specimen: Specimen, no_gate: str | None) -> tuple[str, str]:
    try:
        difference = why_different(specimen)
    except NoComparison as reason:
        # A mixer with a small gated MLP inside, for instance, on a path that only a GPU takes.
        return (FAILED, str(reason)) if no_gate is None else (NO_GATE, no_gate)
    return (FUSED, "") if difference is None else (FAILED, difference)


def _kind(entry: ScannedClass, result: Found | None) -> str:
    """How gate and up come, from recognition where it found them, and else from the source."""
    if result is not None:
        return result.kind
    if entry.name.endswith("Experts"):
        return "experts"
    return "packed" if any(product.splits for product in entry.products) else "separate"


def _activation(entry: ScannedClass, specimen: Specimen | None) -> str:
    """The name of the gate's activation in the default config, looked up independently of recognition."""
    names = dict.fromkeys(_name(product.activation, specimen) for product in entry.products)
    for product in entry.products:
        argument, other = product.argument, product.other
        if "sigmoid" in product.activation and argument.startswith(f"{other} * "):
            return f"x * sigmoid({argument.removeprefix(f'{other} * ')} x)"
    return next((name for name in names if _is_silu(name)), next(iter(names)))


def _is_silu(activation: str) -> bool:
    return any(name in activation.lower() for name in ("silu", "swish", "swiglu", "x * sigmoid"))


def _name(activation: str, specimen: Specimen | None) -> str:
    """`self.act_fn` -> the class or function behind it; anything else as written, without its module."""
    written = activation.removeprefix("self.")
    if written == activation or specimen is None:
        name = activation if "[" in activation else activation.split(".")[-1]
        return _GLU if name.lower() == "glu" else name
    try:
        value = operator.attrgetter(written)(specimen.module)
    except AttributeError:
        return written
    if isinstance(value, nn.Sequential):
        value = next((child for child in reversed(value) if _is_activation(child)), value)
    return _GLU if isinstance(value, nn.GLU) else getattr(value, "__name__", type(value).__name__)


def _is_activation(module: nn.Module) -> bool:
    return not list(module.parameters()) and type(module).__module__ == nn.SiLU.__module__
