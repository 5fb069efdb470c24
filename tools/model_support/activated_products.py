"""Finds the products of an activated tensor in the source of a class, by a small data-flow analysis."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tools.model_support.activation_names import Scope, text_of

_WHOLE_UNITS = {"F.glu", "nn.functional.glu", "torch.nn.functional.glu", "nn.GLU", "torch.nn.GLU"}

# Calls whose result is still an activated tensor. The result of any other function or child module is not.
_PRESERVING = re.compile(
    r"to|float|half|bfloat16|double|type|type_as|clone|contiguous|view|reshape|unsqueeze_?|squeeze_?|transpose|permute|"
    r"flatten|unflatten|expand|expand_as|repeat|repeat_interleave|clamp_?|clip|minimum|maximum|chunk|split|tensor_split|"
    r"unbind|cat|stack|where|pad|add_?|sub_?|neg|mul_?|multiply|div_?|masked_fill_?|gather|index_select|rearrange|"
    r"\w*drop(out)?\d*|\w*drop_?path|\w*norm\d*|\w*identity\w*|\w*rounder\w*",
    re.IGNORECASE,
)
_MULTIPLIED = re.compile(r"(?<!\*)\*(?!\*)|mul|glu|act\w*\(|_apply_gate", re.IGNORECASE)
_SPLITS = re.compile(r"chunk\(|split\(|unbind\(|glu\(|\[\.\.\., [^\]]*[:01]|_state\[[01]\]", re.IGNORECASE)
_MULTIPLIES = {"mul", "mul_", "multiply", "multiply_", "addcmul", "addcmul_"}


@dataclass(frozen=True)
class Product:
    """`activation(argument) * other`, each as written."""

    method: str
    line: int
    source: str
    activation: str
    argument: str
    other: str
    # Whether the method splits a tensor in two.
    splits: bool = False
    inherited_from: str = ""


@dataclass(frozen=True)
class Activated:
    """An activation's output, possibly after a cast, slice, clamp, norm or dropout."""

    activation: str
    argument: str


def module_scope(tree: ast.Module) -> Scope:
    """The functions of a module that return an activated tensor, or have a product inside."""
    scope = Scope()
    for node in top_level(tree):
        if isinstance(node, ast.FunctionDef):
            method = _Method(node.name, scope)
            method.run(node)
            if method.products:
                scope.gated_functions[node.name] = method.products[0].activation
            elif method.returned is not None:
                scope.callables[node.name] = method.returned.activation
    return scope


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The module's statements, those under a top-level `if` or `try` included."""
    pending = list(reversed(tree.body))
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending.extend(node.body + node.orelse)


def products_of(cls: ast.ClassDef, scope: Scope, lines: list[str]) -> Iterator[Product]:
    """Every product of an activated tensor in the class's methods; `lines` are the module's."""
    own = scope.of_class(cls)
    functions = list(_functions(cls))
    for function in functions:
        text = "\n".join(lines[function.lineno - 1 : function.end_lineno])
        # Most methods contain no product and are not analysed.
        if not _MULTIPLIED.search(text) and not any(name in text for name in scope.gated_functions):
            continue
        method = _Method(function.name, own)
        method.run(function)
        if function.name == "_apply_gate" and not method.products:
            source = text_of(function.body[-1])
            yield Product(function.name, function.lineno, source, "self.act_fn", "gate_up", "gate_up")
        yield from (replace(product, splits=bool(_SPLITS.search(text))) for product in method.products)
    for decorator in cls.decorator_list:
        # The decorator gives the class the default `_apply_gate`: act_fn(gate) * up.
        text = text_of(decorator)
        overridden = any(function.name == "_apply_gate" for function in functions)
        if text.startswith("use_experts_implementation") and "has_gate=False" not in text and not overridden:
            yield Product("_apply_gate", cls.lineno, f"@{text}", "self.act_fn", "gate", "up")


def _functions(cls: ast.ClassDef) -> Iterable[ast.FunctionDef]:
    return (node for node in cls.body if isinstance(node, ast.FunctionDef))


class _Method(ast.NodeVisitor):
    """One function, statement by statement: the names of activated tensors, and the products of one."""

    def __init__(self, name: str, scope: Scope):
        self.name = name
        self.scope = Scope(dict(scope.callables), scope.gated_functions)
        self.holding: dict[str, Activated] = {}
        self.products: list[Product] = []
        self.returned: Activated | None = None
        self.looping = False

    def run(self, function: ast.FunctionDef) -> None:
        self._statements(function.body)

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._statements(node.body)

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self.returned = self.activated(node.value) or self.returned

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = dict(self.holding)
        self._statements(node.body)
        after, self.holding = self.holding, before
        self._statements(node.orelse)
        self.holding = {**after, **self.holding}

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        activation = self.scope.names_activation(node.iter) if isinstance(node.iter, ast.Attribute) else None
        if activation and isinstance(node.target, ast.Name):
            self.scope.callables[node.target.id] = activation
        # The body of the outermost loop is read twice, for values that one iteration passes to the next.
        turns = 1 if self.looping else 2
        self.looping = True
        self._statements(node.body * turns)
        self.looping = turns == 1

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        combined = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node)
        self.visit(combined)
        self._assign(node.target, combined)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            self._multiplied(node, node.left, node.right)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function, arguments = text_of(node.func), node.args
        activation = self.scope.names_activation(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _MULTIPLIES:
            factors = arguments if function.startswith("torch.") else [node.func.value, *arguments]
            for one, other in itertools.pairwise(factors):
                self._multiplied(node, one, other)
        elif function in self.scope.gated_functions:
            self.products.append(self._product(node, self.scope.gated_functions[function], *_texts(node)))
        elif activation in _WHOLE_UNITS or (activation and self._is_two_tensors(function, arguments)):
            written = self._as_written(node.func, activation)
            self.products.append(self._product(node, written, *_texts(node)))

    def activated(self, node: ast.expr) -> Activated | None:
        """The activated tensor that `node` is, if it is one."""
        if isinstance(node, ast.Call):
            return self._activated_by_call(node)
        if isinstance(node, ast.Name | ast.Attribute):
            return self.holding.get(text_of(node))
        if isinstance(node, ast.Subscript):
            return self.activated(node.value)
        parts = {
            ast.BinOp: ("left", "right"), ast.UnaryOp: ("operand",), ast.IfExp: ("body", "orelse"),
            ast.NamedExpr: ("value",), ast.Starred: ("value",),
        }.get(type(node), ())  # fmt: skip
        return self._first(getattr(node, part) for part in parts)

    def _activated_by_call(self, node: ast.Call) -> Activated | None:
        activation = self.scope.names_activation(node.func)
        is_method = isinstance(node.func, ast.Attribute)
        if activation:
            arguments = node.args or ([node.func.value] if is_method else [])
            return Activated(self._as_written(node.func, activation), text_of(arguments[0]) if arguments else "")
        name = node.func.attr if is_method else getattr(node.func, "id", "")
        if not _PRESERVING.fullmatch(name):
            return None
        lists = [item for arg in node.args for item in (arg.elts if isinstance(arg, ast.List | ast.Tuple) else [arg])]
        return self._first([*([node.func.value] if is_method else []), *lists])

    def _as_written(self, function: ast.expr, activation: str) -> str:
        # An attribute can be looked up on an instance; a local name is replaced by its activation.
        text = text_of(function)
        return text if text.startswith("self.") else activation

    def _first(self, nodes: Iterable[ast.expr]) -> Activated | None:
        return next(filter(None, map(self.activated, nodes)), None)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
            for one, part in zip(target.elts, values, strict=False):
                self._assign(one, part)
            return
        name = text_of(target.value if isinstance(target, ast.Subscript) else target)
        held = self.activated(value)
        if held is not None:
            self.holding[name] = held
        elif not isinstance(target, ast.Subscript):
            self.holding.pop(name, None)
            activation = self.scope.built_from_activation(value) if not isinstance(value, ast.Call) else None
            if activation and isinstance(target, ast.Name):
                self.scope.callables[name] = activation

    def _multiplied(self, node: ast.expr, left: ast.expr, right: ast.expr) -> None:
        for one, other in ((left, right), (right, left)):
            held = self.activated(one)
            if held is not None and not _is_number(other):
                self.products.append(self._product(node, held.activation, held.argument, text_of(other)))
                return

    def _product(self, node: ast.expr, activation: str, argument: str, other: str) -> Product:
        return Product(self.name, node.lineno, text_of(node), activation, argument, other)

    def _is_two_tensors(self, function: str, arguments: list[ast.expr]) -> bool:
        is_own = function.startswith("self.") and len(arguments) == 2
        return is_own and not any(_is_number(argument) for argument in arguments)


def _texts(node: ast.Call) -> tuple[str, str]:
    texts = [text_of(argument) for argument in node.args] or [""]
    return texts[0], texts[-1]


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and _is_number(node.operand))
