"""From a class's source to its gated products, or to the reason why it has none that can be fused.

source           from a method to its syntax tree, proved to be what runs, and back
flow, shapes     where names get their values; what single expressions look like
matching         the gated products of one method
methods          the methods of a class, and what the names in them stand for
recognise        the products of one module
"""
