"""Finds the names in a modeling file that apply an activation when they are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Names of activations in modeling files: torch's functions and modules, ACT2FN, and attributes.
_ACTIVATION = re.compile(
    r"(act|act_?fn|\w*activation(_?fn|_?func|_?function|s)?|act_\w+|\w+_act(_fn)?|act2fn|act2cls|elu|selu|celu|"
    r"\w*(silu|swish|gelu|relu|mish|sigmoid|tanh|softplus|glu))\d*(tanh|_?activation)?",
    re.IGNORECASE,
)
_NOT_ACTIVATION = re.compile(r"(get_(?!activation)|set_|update_|init_|is_|num_|log_?sigmoid|arctan)\w*", re.IGNORECASE)


@dataclass
class Scope:
    """The callables that apply an activation, and the functions that contain a whole product."""

    # As written -> the activation behind it.
    callables: dict[str, str] = field(default_factory=dict)
    # Function -> the activation of its product.
    gated_functions: dict[str, str] = field(default_factory=dict)

    def of_class(self, cls: ast.ClassDef) -> Scope:
        """This scope and the attributes that the class builds from activations."""
        scope = Scope(dict(self.callables), self.gated_functions)
        for node in _statements(cls):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                activation = self.built_from_activation(node.value)
                if activation:
                    scope.callables[text_of(node.targets[0])] = activation
        return scope

    def built_from_activation(self, value: ast.expr) -> str | None:
        """The activation that `value` is, or that is among the modules that a container is built of."""
        if isinstance(value, ast.IfExp):
            return self.built_from_activation(value.body) or self.built_from_activation(value.orelse)
        if isinstance(value, ast.Name | ast.Attribute | ast.Subscript):
            return self.names_activation(value)
        if not isinstance(value, ast.Call):
            return None
        if text_of(value.func).split(".")[-1] not in ("Sequential", "ModuleList"):
            return self.names_activation(value.func)
        items = [item for arg in value.args for item in (arg.elts if isinstance(arg, ast.List) else [arg])]
        return next(filter(None, map(self.built_from_activation, items)), None)

    def names_activation(self, function: ast.expr) -> str | None:
        """The activation's name when `function`, called, applies one."""
        text = text_of(function)
        if text in self.callables:
            return self.callables[text]
        if isinstance(function, ast.Subscript):
            return text if self.names_activation(function.value) else None
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        return text if _ACTIVATION.fullmatch(name) and not _NOT_ACTIVATION.fullmatch(name) else None


def text_of(node: ast.AST) -> str:
    """`node` as written."""
    # Most nodes are dotted names, and ast.unparse is slow.
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
        return f"{text_of(node.value)}.{node.attr}"
    return ast.unparse(node)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements inside, however deep; expressions, most of a tree, are skipped."""
    for block in ("body", "orelse", "finalbody", "handlers"):
        for statement in getattr(node, block, ()):
            yield statement
            yield from _statements(statement)
