"""The class of a fused module, and what its methods call.

classes          the subclass, and how a module gets it and loses it
rewrite          a method with its gated products replaced by calls
fusing           those calls: whether to fuse now, and the product
ownership        whether the product may be written over gate
"""
