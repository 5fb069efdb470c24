"""Changing the gates' activation, in the modules and in the config, so that a reload computes the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from hf_swiglu.fusion import FusedModule
from hf_swiglu.patterns import ACTIVATION_MODULES, GATINGS
from hf_swiglu.recognition import NotFusable, Product
from hf_swiglu.survey import Found

# By the power of the gate in the product: `reference.Gating`.
ACTIVATIONS = {"silu": 1, "swiglu": 2}

# Where a swapped module keeps what it had: in `__dict__`, past nn.Module's own bookkeeping; copies take it along. The
# name of the child, the activation that stood there, and the config's entries that named it: a plain tuple, so that a
# pickle loads without this package.
_RECORD = "_hf_swiglu_swap"


@contextlib.contextmanager
def swapped(model: nn.Module, surveyed: list[tuple[str, nn.Module, Found]], activation: str) -> Iterator[None]:
    """Swap the activation of every gated MLP that the survey found; an error inside undoes it.

    Raises:
        ValueError: an unknown activation, an MLP whose activation cannot be swapped, or a swap after which a reload
            from the config would not compute what the model computes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'patch_model: activation must be "swiglu" or "silu"; got {activation!r}')
    done: list[nn.Module] = []
    try:
        for name, module, found in surveyed:
            if isinstance(found, NotFusable) or (found.gating and found.gating.power == ACTIVATIONS[activation]):
                continue
            _swap(model, name, module, _swappable_child(name, module, found), activation)
            done.append(module)
        if done:
            _check_reload(model)
        yield
    except BaseException:
        for module in done:
            _restore_one(module)
        raise


def _swappable_child(name: str, module: nn.Module, found: Product) -> str:
    if isinstance(module, FusedModule):
        raise ValueError(
            f"patch_model: {name} is already fused with {found.activation}; call unpatch_model before swapping"
        )
    if found.child is None:
        raise ValueError(
            f"patch_model: {name} ({type(module).__name__}) calls {found.activation} in its forward instead of "
            "reading an activation from its config, so it cannot be swapped. Leave it out with only="
        )
    return found.child


def restore(model: nn.Module) -> list[nn.Module]:
    """Undo every swap below `model`; returns the modules whose activation was restored."""
    swaps = [module for module in model.modules() if _RECORD in vars(module)]
    for module in swaps:
        _restore_one(module)
    return swaps


def _swap(model: nn.Module, name: str, module: nn.Module, child: str, activation: str) -> None:
    original = module.get_submodule(child)
    # A second swap keeps the first one's record: undo goes back to the beginning.
    _, _, config_edits = vars(module).setdefault(_RECORD, (child, original, []))
    module.set_submodule(child, ACT2FN[activation].train(original.training))
    config = _governing_config(model, name)
    for key, value in _activation_entries(config, type(original)):
        setattr(config, key, activation)
        config_edits.append((config, key, value))


def _restore_one(module: nn.Module) -> None:
    child, original, config_edits = vars(module).pop(_RECORD)
    module.set_submodule(child, original)
    for config, key, value in reversed(config_edits):
        setattr(config, key, value)


def _governing_config(model: nn.Module, name: str) -> object | None:
    """The config of the nearest PreTrainedModel around the module: its own part of a composite config."""
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
    return cls is activation_type or (cls in GATINGS and GATINGS.get(cls) is GATINGS.get(activation_type))


def _check_reload(model: nn.Module) -> None:
    """Build every transformers model in `model` again from its config, and compare the activations place by place."""
    inside: tuple[nn.Module, ...] = ()
    for owner in model.modules():
        if not isinstance(owner, transformers.PreTrainedModel) or owner in inside:
            continue
        inside += tuple(owner.modules())
        with torch.device("meta"):
            twin = type(owner)(copy.deepcopy(owner.config))
        for name, rebuilt in twin.named_modules():
            if type(rebuilt) not in ACTIVATION_MODULES:
                continue
            present = owner.get_submodule(name)
            if not _computes_alike(type(present), type(rebuilt)):
                raise ValueError(
                    f"patch_model: the config of {type(owner).__name__} cannot express this swap: saved and reloaded, "
                    f"its {name} would be {type(rebuilt).__name__} where the model has {type(present).__name__}. "
                    "Swap all of its MLPs, or none"
                )


def _computes_alike(present: type, rebuilt: type) -> bool:
    return present is rebuilt or (present in GATINGS and GATINGS[present] is GATINGS.get(rebuilt))
