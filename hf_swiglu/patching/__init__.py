"""Fusing the gated MLPs of models that are loaded, or being loaded, and undoing it.

methods, flow, shapes, matching     the gated products in the source of a class's methods
recognition, survey                 the products of one module, of a model
source, rewriting, classes          the class whose methods fuse them
activations, fusing, ownership, recompute, composites      what such methods call
memory, planning, forwards, regions, compiled      keep and tile
rowwise, scopes, operators, children      whether a forward may run again, and on a part of its rows
patch, swap, verify, report, load, fusion_config      what users call
"""
