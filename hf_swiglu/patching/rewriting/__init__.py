"""The class of a fused module, and the functions that its methods call.

fused_classes        the subclass, and setting or restoring the class of a module
rewritten_methods    a method with its gated products replaced by calls
fused_calls          those calls: the decision to fuse, and the product
ownership            whether the product may be written over gate
"""
