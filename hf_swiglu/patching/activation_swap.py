"""Changing the gates' activation, in the modules and in the config, so that a reloaded model computes the same."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from hf_swiglu.patching.activations import ACTIVATION_CLASSES, ACTIVATION_PARAMS
from hf_swiglu.patching.recognition.gated_mlps import Found

_logger = logging.getLogger(__name__)

# By the power of the gate in the product: `reference.GLUParams`.
ACTIVATIONS = {"silu": 1, "swiglu": 2}

# The attribute of a swapped module for undoing the swap: in `__dict__`, not a submodule, and copied with the module. It
# is (name of the child, its original activation, the original config entries): a plain tuple, so that a pickle loads
# without this package.
_RECORD = "_hf_swiglu_swap"


@contextlib.contextmanager
def swapped(model: nn.Module, surveyed: list[tuple[str, nn.Module, Found]], activation: str) -> Iterator[None]:
    """Swap the activation of every gated MLP that the survey found; an error inside undoes it.

    Raises:
        ValueError: an unknown activation, an MLP whose activation cannot be swapped, or a swap after which a model
            reloaded from the config would not compute the same.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'patch_model: activation must be "swiglu" or "silu"; got {activation!r}')
    done: list[tuple[nn.Module, tuple]] = []
    names: list[str] = []
    try:
        for name, module, found in surveyed:
            is_gated = found.params is not None or found.child is not None
            if not is_gated or (found.params and found.params.power == ACTIVATIONS[activation]):
                continue
            done.append((module, _swap(model, name, module, _swappable_child(name, module, found), activation)))
            names.append(name)
        if done:
            _check_reload(model, names, activation)
        yield
    except BaseException:
        for module, step in reversed(done):
            _undo_swap(module, step)
        raise
    if done:
        _warn_of_adapters(model, activation)


def restore(model: nn.Module) -> list[nn.Module]:
    """Undo every swap below `model`; returns the modules whose activation was restored."""
    swaps = [module for module in model.modules() if _RECORD in vars(module)]
    for module in swaps:
        child, original, edited = vars(module).pop(_RECORD)
        module.set_submodule(child, original)
        _reset(edited)
    return swaps


def _swappable_child(name: str, module: nn.Module, found: Found) -> str:
    if found.child is None:
        raise ValueError(
            f"patch_model: {name} ({type(module).__name__}) calls {found.activation} in its forward instead of "
            "reading an activation from its config, so it cannot be swapped. Leave it out with only="
        )
    return found.child


def _swap(model: nn.Module, name: str, module: nn.Module, child: str, activation: str) -> tuple:
    """Swap one module's activation; returns (child, the previous activation, the previous config entries)."""
    present = module.get_submodule(child)
    module.set_submodule(child, ACT2FN[activation].train(present.training))
    config = _governing_config(model, name)
    edited = [(config, key, value) for key, value in _activation_entries(config, type(present))]
    for _, key, _ in edited:
        setattr(config, key, activation)
    # A second swap keeps the record of the first one, so that undo restores the original.
    _, _, recorded = vars(module).setdefault(_RECORD, (child, present, []))
    recorded += edited
    return child, present, edited


def _undo_swap(module: nn.Module, step: tuple) -> None:
    child, present, edited = step
    module.set_submodule(child, present)
    _reset(edited)
    _, original, recorded = vars(module)[_RECORD]
    del recorded[len(recorded) - len(edited) :]
    if original is present:
        del vars(module)[_RECORD]


def _reset(edited: list[tuple]) -> None:
    for config, key, value in reversed(edited):
        setattr(config, key, value)


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
    try:
        with torch.device("meta"):
            return type(owner)(copy.deepcopy(owner.config))
    except Exception:
        # Constructors outside transformers may raise any exception.
        return None


def _computes_alike(present: type, rebuilt: type) -> bool:
    return present is rebuilt or (
        present in ACTIVATION_PARAMS and ACTIVATION_PARAMS[present] is ACTIVATION_PARAMS.get(rebuilt)
    )


def _warn_of_adapters(model: nn.Module, activation: str) -> None:
    """Warn that PEFT saves an adapter without its base's config, with only the name of the base's checkpoint."""
    loaded = [
        part.name_or_path
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel) and part.name_or_path
    ]
    if loaded:
        _logger.warning(
            'the gates of %s now have "%s", which its config states and save_pretrained saves. An adapter saved by '
            'itself (PEFT) does not contain it: load its base, %s, under patch_on_load(activation="%s")',
            type(model).__name__,
            activation,
            loaded[0],
            activation,
        )
