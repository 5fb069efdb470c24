"""Changing the gates' activation, in the modules and in the config, so that a reloaded model computes the same."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import logging

import torch
import transformers
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from hf_swiglu.new_thread import in_new_thread
from hf_swiglu.patching.activations import ACTIVATION_CLASSES, ACTIVATION_PARAMS
from hf_swiglu.patching.changes import Change, Changes, entry, removal
from hf_swiglu.patching.recognition.gated_mlps import Found

_logger = logging.getLogger(__name__)

# By the power of the gate in the product: `reference.GLUParams`.
ACTIVATIONS = {"silu": 1, "swiglu": 2}

# The attribute of a swapped module for undoing the swap: in `__dict__`, not a submodule, and copied with the module. It
# is (name of the child, its original activation, the original config entries): a plain tuple, so that a pickle loads
# without this package.
_RECORD = "_hf_swiglu_swap"


def swap(model: nn.Module, surveyed: list[tuple[str, nn.Module, Found]], activation: str, changes: Changes) -> bool:
    """Swap the activation of every gated MLP that the survey found; returns whether there was any to swap.

    Raises:
        ValueError: an unknown activation, an MLP whose activation cannot be swapped, or a swap after which a model
            reloaded from the config would not compute the same.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'patch_model: activation must be "swiglu" or "silu"; got {activation!r}')
    names: list[str] = []
    for name, module, found in surveyed:
        is_gated = found.params is not None or found.child is not None
        if not is_gated or (found.params and found.params.power == ACTIVATIONS[activation]):
            continue
        changes.make(_swap(model, name, module, _swappable_child(name, module, found), activation))
        names.append(name)
    if names:
        _check_reload(model, names, activation)
    return bool(names)


def restoration(model: nn.Module) -> tuple[list[nn.Module], list[Change]]:
    """(the modules below `model` whose activation was swapped, the changes that undo every swap)"""
    swaps = [module for module in model.modules() if _RECORD in vars(module)]
    pending: list[Change] = []
    for module in swaps:
        child, original, edited = vars(module)[_RECORD]
        pending += [removal(vars(module), _RECORD), _submodule(module, child, original)]
        pending += [entry(vars(config), key, value) for config, key, value in reversed(edited)]
    return swaps, pending


def _swappable_child(name: str, module: nn.Module, found: Found) -> str:
    if found.child is None:
        raise ValueError(
            f"patch_model: {name} ({type(module).__name__}) calls {found.activation} in its forward instead of "
            "reading an activation from its config, so it cannot be swapped. Leave it out with only="
        )
    return found.child


def _swap(model: nn.Module, name: str, module: nn.Module, child: str, activation: str) -> list[Change]:
    """The changes that swap one module's activation, in the module and in its config, and record that."""
    present = module.get_submodule(child)
    config = _governing_config(model, name)
    edited = [(config, key, value) for key, value in _activation_entries(config, type(present))]
    # A second swap keeps the record of the first one, so that undo restores the original.
    _, original, recorded = vars(module).get(_RECORD, (child, present, []))
    return [
        _submodule(module, child, ACT2FN[activation].train(present.training)),
        *(entry(vars(config), key, activation) for _, key, _ in edited),
        entry(vars(module), _RECORD, (child, original, [*recorded, *edited])),
    ]


def _submodule(module: nn.Module, path: str, value: nn.Module) -> Change:
    parent, _, name = path.rpartition(".")
    return entry(module.get_submodule(parent)._modules, name, value)


def _governing_config(model: nn.Module, name: str) -> object | None:
    """The config of the nearest PreTrainedModel that contains the module: its part of a composite config."""
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:depth]))
        if isinstance(owner, transformers.PreTrainedModel):
            return owner.config
    return None


def _activation_entries(config: object | None, activation_type: type) -> list[tuple[str, str]]:
    """The config's entries that name an activation of this type, such as ("hidden_act", "silu")."""
    if config is None:
        return []
    return [
        (key, value)
        for key, value in vars(config).items()
        if isinstance(value, str) and "act" in key and _same_activation(value, activation_type)
    ]


def _same_activation(name: str, activation_type: type) -> bool:
    entry = ACT2CLS.get(name)
    cls = entry[0] if isinstance(entry, tuple) else entry
    return cls is activation_type or (
        cls in ACTIVATION_PARAMS and ACTIVATION_PARAMS.get(cls) is ACTIVATION_PARAMS.get(activation_type)
    )


def _check_reload(model: nn.Module, names: list[str], activation: str) -> None:
    """Build every transformers model in `model` again from its config, and compare the activations module by module.

    Modules that only one of the two has are ignored: layers may have been removed.
    """
    inside: tuple[nn.Module, ...] = ()
    for owner in model.modules():
        if not isinstance(owner, transformers.PreTrainedModel) or owner in inside:
            continue
        inside += tuple(owner.modules())
        twin = _rebuilt(owner)
        if twin is None:
            # Its constructor needs more arguments than the config, so only the config can be checked.
            if not all(_names(_governing_config(model, name), activation) for name in names):
                raise ValueError(
                    f"patch_model: {type(owner).__name__} cannot be built from its config alone, and that config names "
                    "no activation for some of the MLPs to be swapped. Leave them out with only="
                )
            continue
        present = dict(owner.named_modules())
        for name, rebuilt in twin.named_modules():
            if type(rebuilt) not in ACTIVATION_CLASSES or name not in present:
                continue
            if not _computes_alike(type(present[name]), type(rebuilt)):
                raise ValueError(
                    f"patch_model: the config of {type(owner).__name__} cannot express this swap: saved and reloaded, "
                    f"its {name} would be {type(rebuilt).__name__} where the model has {type(present[name]).__name__}. "
                    "Swap all of its MLPs, or none"
                )


def _names(config: object | None, activation: str) -> bool:
    """Whether an entry of the config names the activation."""
    entries = vars(config) if config is not None else {}
    return any(value == activation for key, value in entries.items() if "act" in key)


def _rebuilt(owner: transformers.PreTrainedModel) -> nn.Module | None:
    def build() -> nn.Module | None:
        # Constructors outside transformers may raise any exception.
        with contextlib.suppress(Exception), torch.device("meta"):
            return type(owner)(copy.deepcopy(owner.config))
        return None

    context = contextvars.copy_context()
    # Signals are handled in the main thread: an interrupt of this one would leave it with "meta" as its default device.
    return in_new_thread(lambda: context.run(build))


def _computes_alike(present: type, rebuilt: type) -> bool:
    return present is rebuilt or (
        present in ACTIVATION_PARAMS and ACTIVATION_PARAMS[present] is ACTIVATION_PARAMS.get(rebuilt)
    )


def warn_of_adapters(model: nn.Module, activation: str) -> None:
    """Warn that PEFT saves an adapter without its base's config, with only the name of the base's checkpoint."""
    loaded = [
        part.name_or_path
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel) and part.name_or_path
    ]
    if loaded:
        needed = "; a process that loads it has to import hf_swiglu first" if activation == "swiglu" else ""
        _logger.warning(
            'the gates of %s now have "%s", which its config states and save_pretrained saves%s. An adapter saved by '
            'itself (PEFT) does not contain it: load its base, %s, under patch_on_load(activation="%s")',
            type(model).__name__,
            activation,
            needed,
            loaded[0],
            activation,
        )
