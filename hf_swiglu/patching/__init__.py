"""Fusing the gated MLPs of models that are loaded, or being loaded, and undoing it.

patch_model, verify, report            `patch_model`, `unpatch_model`, and the report
activation_swap                        another activation for the gates, in modules and config
changes                                several changes that happen together, also where an interrupt comes
patch_on_load, fusion_config           patching while a model is built
survey, activations                    the gated products of a model; which activations are SiLU or SwiGLU, and fusable
rewriting/                             the class whose methods fuse the products, and what these methods call
memory/                                the tensors that are kept for backward: keep and tile
recognition/                           the gated products in the source of a class's methods
"""
