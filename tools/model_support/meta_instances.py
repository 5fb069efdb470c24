"""Builds a small model of every model type of the installed transformers, on the meta device, and keeps one instance of
each class."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_swiglu.commands.console import progress
from tools.model_support.small_configs import small_config
from tools.model_support.source_scan import modeling_files


@dataclass
class Instance:
    """The first instance of a class in a built model, and the arguments of its constructor."""

    module: nn.Module
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)


@dataclass
class Instances:
    """An instance of every class in the models that were built."""

    model_types: int
    by_class: dict[type[nn.Module], Instance] = field(default_factory=dict)
    # Model type -> why it could not be built.
    unbuilt_types: dict[str, str] = field(default_factory=dict)

    def keep(self, model: nn.Module) -> None:
        for module in model.modules():
            arguments = vars(module).pop(_ARGUMENTS, ((), {}))
            self.by_class.setdefault(type(module), Instance(module, *arguments))


_ARGUMENTS = "_model_support_arguments"


def import_modeling_files() -> dict[str, str]:
    """Imports every modeling file; returns module -> reason for those that cannot be imported here."""
    failures = {}
    for module in modeling_files():
        try:
            importlib.import_module(module)
        except ImportError as error:
            failures[module] = str(error).splitlines()[0]
    return failures


def build_instances(wanted: Iterable[type[nn.Module]]) -> Instances:
    """Builds each model type once; for `wanted` classes in none of them, other models, or the class alone."""
    instances = Instances(len(CONFIG_MAPPING_NAMES))
    wanted = set(wanted)
    with _recorded(wanted) as begun:
        for model_type in progress(CONFIG_MAPPING_NAMES, "building every model type"):
            reason = _build_failure(functools.partial(_build_type, instances, model_type))
            if reason is not None:
                instances.unbuilt_types[model_type] = reason
        for model in _other_models(wanted, instances):
            _build_failure(functools.partial(_build, instances, model))
        # Some models fail after their parts are built: because of few layers, or when their weights are tied.
        for cls in begun.keys() - instances.by_class.keys():
            instances.keep(begun[cls])
        for cls in sorted(wanted - instances.by_class.keys(), key=lambda cls: (cls.__module__, cls.__name__)):
            _build_failure(functools.partial(_build_alone, instances, cls))
    return instances


@contextlib.contextmanager
def _recorded(classes: set[type[nn.Module]]) -> Iterator[dict[type[nn.Module], nn.Module]]:
    """Records the constructor arguments of each instance of these classes; yields the first instance of each."""
    begun: dict[type[nn.Module], nn.Module] = {}
    originals = {cls: vars(cls).get("__init__") for cls in classes}
    for cls in classes:
        cls.__init__ = _recording(cls, cls.__init__, begun)
    try:
        yield begun
    finally:
        for cls, original in originals.items():
            if original is None:
                del cls.__init__
            else:
                cls.__init__ = original


def _recording(cls: type[nn.Module], original, begun: dict[type[nn.Module], nn.Module]):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            vars(self)[_ARGUMENTS] = (args, kwargs)
            begun.setdefault(cls, self)

    return __init__


def _build_failure(build: Callable[[], None]) -> str | None:
    """Builds; returns the reason if that fails, because one model that cannot be built here must not end the run."""
    try:
        build()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None


def _build_type(instances: Instances, model_type: str) -> None:
    config_class = type(AutoConfig.for_model(model_type))
    names = modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
    mapped = [names] if isinstance(names, str) else list(names or ())
    models = _models_by_config().get(config_class, [])
    chosen = [cls for cls in models if cls.__name__ in mapped] or models[:1]
    if not chosen:
        raise LookupError(f"transformers has no model class for {config_class.__name__}")
    for cls in chosen:
        _build(instances, cls)


@functools.cache
def _models_by_config() -> dict[type, list[type[PreTrainedModel]]]:
    models: dict[type, list[type[PreTrainedModel]]] = {}
    for module in filter(None, map(sys.modules.get, modeling_files())):
        for cls in vars(module).values():
            if _is_model(cls, module):
                models.setdefault(cls.config_class, []).append(cls)
    return models


def _is_model(cls: object, module) -> bool:
    return (
        inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and "forward" in vars(cls)
        and cls.config_class is not None
    )


def _other_models(wanted: set[type[nn.Module]], instances: Instances) -> Iterator[type[PreTrainedModel]]:
    """The models of each module with a class that is still missing."""
    for models in _models_by_config().values():
        for cls in models:
            missing = {lacking.__module__ for lacking in wanted - instances.by_class.keys()}
            if cls.__module__ in missing and cls not in instances.by_class:
                yield cls


def _build(instances: Instances, cls: type[PreTrainedModel]) -> None:
    with _meta():
        instances.keep(cls(small_config(cls.config_class)))


def _build_alone(instances: Instances, cls: type[nn.Module]) -> None:
    """Builds an instance alone, of a class that no default model contains."""
    errors = []
    for config in _configs_for(cls):
        try:
            arguments = _guess_arguments(cls, config)
            with _meta():
                instances.keep(cls(**arguments))
            return
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else LookupError("its module names no config class")


def _configs_for(cls: type[nn.Module]) -> Iterator[object]:
    module = importlib.import_module(cls.__module__)
    annotated = str(inspect.signature(cls.__init__).parameters.get("config", ""))
    named = [value for value in vars(module).values() if inspect.isclass(value) and value in _models_by_config()]
    for config_class in sorted(named, key=lambda value: value.__name__ not in annotated):
        try:
            config = small_config(config_class)
        except Exception:
            # Some configs need a library that is not installed, or have no default.
            continue
        yield config
        yield from (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))
    # For unused classes of transformers, which are copies of LLaMA's.
    yield LlamaConfig()


def _guess_arguments(cls: type[nn.Module], config: object) -> dict[str, object]:
    """Arguments by the parameters' names: the config, its attribute of that name, or the first layer's index."""
    arguments = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if name == "config" or name.endswith("_config"):
            arguments[name] = config
        elif name in ("layer_idx", "layer_id", "layer_index"):
            arguments[name] = 0
        else:
            arguments[name] = getattr(config, _SYNONYMS.get(name, name))
    return arguments


_SYNONYMS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "in_features": "hidden_size",
    "activation": "hidden_act",
}


@contextlib.contextmanager
def _meta() -> Iterator[None]:
    # Some constructors read values of a linspace; this context of transformers supports that on the meta device.
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), safe(), initialization.no_init_weights():
        yield
