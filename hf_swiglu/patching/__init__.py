"""Fusing the gated MLPs of models that are loaded, or being loaded, and undoing it.

methods, flow, shapes, matching     the gated products in the source of a class's methods
recognition, survey                 the products of one module, of a model
source, rewriting, classes          the class whose methods fuse them
activations, fusing, ownership, recompute      what such methods call
patch, swap, verify, report, load, fusion_config      what users call
"""
