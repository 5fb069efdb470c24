"""From a class's source to its gated products, or to the reason why it has none that can be fused.

method_source         from a method to its syntax tree, proved to compile to the method's bytecode, and back
flow, expressions     the definitions of names; patterns of single expressions
gated_products        the gated products of one method
methods               the methods of a class, and the values of the names in them
gated_mlps            the products of one module
"""
