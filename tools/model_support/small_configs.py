"""Configs with few layers and few experts. Widths are not changed: on the meta device they cost nothing."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass

from transformers import PretrainedConfig

# Counts of repeated parts. Four layers include most of the kinds of layers that hybrid models alternate.
_FEW = {
    **dict.fromkeys(
        (
            "num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers", "layers",
            "num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
            "depth", "conf_num_hidden_layers", "speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers",
            "folding_trunk_num_hidden_layers", "num_blocks", "num_global_layers", "resampler_depth", "l_layers",
            "decoder_num_layers", "text_encoder_num_layers", "num_timestamp_prediction_layers", "x_layers",
            "num_layers_per_stack", "r_layers", "num_self_attends_per_block",
        ),
        4,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
}  # fmt: skip
# Parts that the default config leaves unset or switched off, and settings that few layers make impossible.
_OVERRIDES: dict[str, dict[str, object]] = {
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 128},
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "depth")


def small_config(cls: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of this class with few layers; the default one where the class takes no smaller."""
    default = cls()
    try:
        small = cls(**_arguments(default, {}))
    except Exception:
        # Configs raise any exception in their own checks; a large model builds as well, only slower.
        return default
    # Composite configs of older releases omit a part that is given as a config.
    return small if vars(small).keys() >= vars(default).keys() else default


def _arguments(config: PretrainedConfig, changed: dict[str, object]) -> dict[str, object]:
    """Arguments of the config's class for a config like this one, but with few layers."""
    changed |= _OVERRIDES.get(config.model_type, {})
    declared = _declared(type(config))
    values = {name: vars(config)[name] for name in declared if name in vars(config)}
    many = max((values[name] for name in _LAYERS if type(values.get(name)) is int), default=0)
    for name, value in values.items():
        listed = isinstance(declared[name], list | tuple) and len(declared[name]) > 0
        if isinstance(value, PretrainedConfig):
            changed[name] = type(value)(**_arguments(value, _differences(value)))
        elif name in changed:
            continue
        elif name in _FEW and type(value) is int and value > _FEW[name]:
            changed[name] = _FEW[name]
        elif listed and isinstance(value, list | tuple) and len(value) == many > _FEW["depth"]:
            changed[name] = _each_kind(list(value), _FEW["depth"])
    return changed


def _differences(config: PretrainedConfig) -> dict[str, object]:
    """The fields that a composite model's config sets differently from the part's own defaults."""
    default = type(config)()
    ours, theirs = vars(config), vars(default)
    return {name: ours[name] for name in _declared(type(config)) if name in ours and ours[name] != theirs.get(name)}


def _declared(cls: type[PretrainedConfig]) -> dict[str, object]:
    """The fields of the config's class, or the parameters of its constructor, with their defaults."""
    if is_dataclass(cls):
        return {field.name: field.default for field in fields(cls)}
    parameters = inspect.signature(cls).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}


def _each_kind(values: list, count: int) -> list:
    """`count` of the values, with every kind of value among them where they fit."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]][:count]
    return [*kinds, *values[: count - len(kinds)]]
