"""Classifies every class of the source scan by the result of `patch_model`."""

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

from hf_swiglu.patching.recognition.gated_mlps import Found
from hf_swiglu.patching.survey import survey
from tools.model_support.comparison import NoComparison, why_different
from tools.model_support.meta_instances import Instance, Instances, build_instances, import_modeling_files
from tools.model_support.not_mlp_gates import why_not_mlp_gate
from tools.model_support.page import DECLINED, FAILED, FUSED, NO_GATE, OTHER, ClassStatus, ModelSupport
from tools.model_support.source_scan import ScannedClass, scan

# The gated linear unit of Dauphin et al. (2016), in PyTorch one function.
_GLU = "sigmoid (GLU)"


def classify_installed_transformers() -> ModelSupport:
    """Scans, builds and compares all classes of the installed transformers; takes a minute or two.

    Example:
        >>> from tools.model_support.gate_classification import classify_installed_transformers
        >>> classify_installed_transformers().totals["failed"]  # doctest: +SKIP
        0
    """
    with _without_warnings_and_threads():
        return _classify()


@contextlib.contextmanager
def _without_warnings_and_threads() -> Iterator[None]:
    verbosity, threads, collecting = transformers.logging.get_verbosity(), torch.get_num_threads(), gc.isenabled()
    # The comparisons are small: starting a second thread takes longer than its part of the work.
    torch.set_num_threads(1)
    # Syntax trees and models are many objects that all stay in use: garbage collection halves the speed of the scan.
    gc.disable()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # About optional libraries that models need to run; here they are only built.
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def _classify() -> ModelSupport:
    scanned = scan()
    failures = import_modeling_files()
    classes = {cls: entry for entry in scanned.values() if (cls := _class_of(entry)) is not None}
    instances = build_instances(classes)
    found = _surveyed(instances, classes)
    by_key = {entry.key: cls for cls, entry in classes.items()}
    rows = [_row(entry, by_key.get(key), instances, found) for key, entry in scanned.items()]
    missed = [
        f"{cls.__module__.split('.')[-2]}.{cls.__name__}"
        for cls, result in found.items()
        if cls not in classes and result.choices
    ]
    return ModelSupport(
        transformers.__version__,
        tuple(sorted(rows, key=lambda row: (row.family, row.name))),
        tuple(sorted(missed)),
        dict(sorted({**failures, **instances.unbuilt_types}.items())),
        instances.model_types,
    )


def _class_of(entry: ScannedClass) -> type[nn.Module] | None:
    cls = getattr(sys.modules.get(entry.module), entry.name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None


def _surveyed(instances: Instances, classes: Container[type[nn.Module]]) -> dict[type[nn.Module], Found]:
    """What recognition finds in the classes of the scan, and in every other class whose code multiplies."""
    built = [
        ("", instance.module)
        for cls, instance in instances.by_class.items()
        if cls in classes or (cls.__module__.startswith("transformers.models.") and _multiplies(cls))
    ]
    return {type(module): result for _, module, result in survey(built)}


def _multiplies(cls: type[nn.Module]) -> bool:
    functions = [function for function in vars(cls).values() if isinstance(function, types.FunctionType)]
    return any(
        instruction.argrepr in ("*", "*=") or instruction.argval in ("mul", "multiply", "mul_")
        for function in functions
        for instruction in dis.get_instructions(function)
    )


def _row(
    entry: ScannedClass, cls: type[nn.Module] | None, instances: Instances, found: dict[type, Found]
) -> ClassStatus:
    instance = instances.by_class.get(cls) if cls is not None else None
    result = found.get(cls) if cls is not None else None
    activation = _activation(entry, instance)
    status, reason = _status(entry, instance, result, activation)
    if result is not None and result.choices:
        activation = result.activation
    return ClassStatus(entry.family, entry.name, _kind(entry, result), activation, status, reason)


def _status(entry: ScannedClass, instance: Instance | None, result: Found | None, activation: str) -> tuple[str, str]:
    no_gate = why_not_mlp_gate(entry.name, entry.products)
    if result is not None and result.choices:
        return _compared(instance, no_gate)
    if no_gate is not None:
        return NO_GATE, no_gate
    if instance is None:
        return FAILED, "no model is built with it, and it could not be built by itself"
    if not _is_silu(activation):
        return OTHER, f"its gate's activation is {activation}"
    if result is not None:
        return DECLINED, result.reason
    return FAILED, "nothing in it was recognised"


def _compared(instance: Instance, no_gate: str | None) -> tuple[str, str]:
    try:
        difference = why_different(instance)
    except NoComparison as reason:
        # For instance a mixer that contains a small gated MLP, on a path that runs only on a GPU.
        return (FAILED, str(reason)) if no_gate is None else (NO_GATE, no_gate)
    return (FUSED, "") if difference is None else (FAILED, difference)


def _kind(entry: ScannedClass, result: Found | None) -> str:
    """The layout of gate and up: from recognition if it found them, else from the source."""
    if result is not None:
        return result.kind
    if entry.name.endswith("Experts"):
        return "experts"
    return "packed" if any(product.splits for product in entry.products) else "separate"


def _activation(entry: ScannedClass, instance: Instance | None) -> str:
    """The name of the gate's activation in the default config, independently of recognition."""
    names = dict.fromkeys(_name(product.activation, instance) for product in entry.products)
    for product in entry.products:
        argument, other = product.argument, product.other
        if "sigmoid" in product.activation and argument.startswith(f"{other} * "):
            return f"x * sigmoid({argument.removeprefix(f'{other} * ')} x)"
    return next((name for name in names if _is_silu(name)), next(iter(names)))


def _is_silu(activation: str) -> bool:
    return any(name in activation.lower() for name in ("silu", "swish", "swiglu", "x * sigmoid"))


def _name(activation: str, instance: Instance | None) -> str:
    """The name of the class or function of `self.act_fn`; other activations as written, without their module."""
    written = activation.removeprefix("self.")
    if written == activation or instance is None:
        name = activation if "[" in activation else activation.split(".")[-1]
        return _GLU if name.lower() == "glu" else name
    try:
        value = operator.attrgetter(written)(instance.module)
    except AttributeError:
        return written
    if isinstance(value, nn.Sequential):
        value = next((child for child in reversed(value) if _is_activation(child)), value)
    return _GLU if isinstance(value, nn.GLU) else getattr(value, "__name__", type(value).__name__)


def _is_activation(module: nn.Module) -> bool:
    return not list(module.parameters()) and type(module).__module__ == nn.SiLU.__module__
