"""The class of a fused module, and the functions that its methods call.

classes          the subclass, and setting or restoring the class of a module
rewrite          a method with its gated products replaced by calls
fusing           those calls: the decision to fuse, and the product
ownership        whether the product may be written over gate
"""
