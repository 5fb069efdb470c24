"""Fusing the gated MLPs of models that are loaded, or being loaded, and undoing it.

patch, swap, verify, report        `patch_model`, `unpatch_model`, and what they tell
load, fusion_config                patching while a model is built
survey, activations                the gated products of a model; what is SiLU or SwiGLU, and fusable now
rewriting/                         the class whose methods fuse the products, and what such methods call
memory/                            what is kept for backward: keep and tile
recognition/                       the gated products in the source of a class's methods
"""
