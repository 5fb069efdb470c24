"""Which products of an activated tensor a class's source contains: a small data-flow analysis over its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# What modeling files call an activation: torch's own functions and modules, ACT2FN, and attribute names.
_ACTIVATION = re.compile(
    r"(act|act_?fn|\w*activation(_?fn|_?func|_?function|s)?|act_\w+|\w+_act(_fn)?|act2fn|act2cls|elu|selu|celu|"
    r"\w*(silu|swish|gelu|relu|mish|sigmoid|tanh|softplus|glu))\d*(tanh|_?activation)?",
    re.IGNORECASE,
)
_NOT_ACTIVATION = re.compile(r"(get_(?!activation)|set_|update_|init_|is_|num_|log_?sigmoid|arctan)\w*", re.IGNORECASE)
_WHOLE_UNITS = {"F.glu", "nn.functional.glu", "torch.nn.functional.glu", "nn.GLU", "torch.nn.GLU"}

# Calls that hand an activated tensor on. Any other function or child makes something new of its arguments.
_HANDS_ON = re.compile(
    r"to|float|half|bfloat16|double|type|type_as|clone|contiguous|view|reshape|unsqueeze_?|squeeze_?|transpose|permute|"
    r"flatten|unflatten|expand|expand_as|repeat|repeat_interleave|clamp_?|clip|minimum|maximum|chunk|split|tensor_split|"
    r"unbind|cat|stack|where|pad|add_?|sub_?|neg|mul_?|multiply|div_?|masked_fill_?|gather|index_select|rearrange|"
    r"\w*drop(out)?\d*|\w*drop_?path|\w*norm\d*|\w*identity\w*|\w*rounder\w*",
    re.IGNORECASE,
)
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
    inherited_from: str = ""


@dataclass(frozen=True)
class Activated:
    """An expression that is an activation's output, at most cast, cut, clamped, normed or dropped out since."""

    activation: str
    argument: str


@dataclass
class Scope:
    """What the names in a method stand for, where an activation or a product is behind them."""

    callables: dict[str, str] = field(default_factory=dict)
    # Module-level functions with a product inside.
    gated_functions: dict[str, Product] = field(default_factory=dict)

    @classmethod
    def of_module(cls, tree: ast.Module) -> Scope:
        """The aliases of activations and the functions with products at a module's top level."""
        scope = cls()
        for node in top_level(tree):
            if isinstance(node, ast.FunctionDef):
                method = _Method(node.name, scope)
                method.run(node)
                if method.products:
                    scope.gated_functions[node.name] = method.products[0]
                elif method.returned is not None:
                    scope.callables[node.name] = method.returned.activation
        return scope

    def of_class(self, cls: ast.ClassDef) -> Scope:
        """This scope and the attributes that the class builds from activations."""
        scope = Scope(dict(self.callables), self.gated_functions)
        for function in _functions(cls):
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                    activation = self.built_from_activation(node.value)
                    if activation:
                        scope.callables[_text(node.targets[0])] = activation
        return scope

    def built_from_activation(self, value: ast.expr) -> str | None:
        """The activation that `value` is, or that a container of modules built by it ends in."""
        if isinstance(value, ast.IfExp):
            return self.built_from_activation(value.body) or self.built_from_activation(value.orelse)
        if isinstance(value, ast.Subscript):
            return self.names_activation(value)
        if isinstance(value, ast.Name | ast.Attribute):
            return self.names_activation(value)
        if isinstance(value, ast.Call):
            if _text(value.func).split(".")[-1] in ("Sequential", "ModuleList"):
                items = [item for arg in value.args for item in (arg.elts if isinstance(arg, ast.List) else [arg])]
                return next(filter(None, map(self.built_from_activation, items)), None)
            return self.names_activation(value.func)
        return None

    def names_activation(self, function: ast.expr) -> str | None:
        """The activation's name when `function`, called, applies one."""
        text = _text(function)
        if text in self.callables:
            return self.callables[text]
        if isinstance(function, ast.Subscript):
            return text if self.names_activation(function.value) else None
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        return text if _ACTIVATION.fullmatch(name) and not _NOT_ACTIVATION.fullmatch(name) else None


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The module's statements, those under a top-level `if` or `try` included."""
    pending = list(reversed(tree.body))
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending.extend(node.body + node.orelse)


def products_of(cls: ast.ClassDef, scope: Scope) -> Iterator[Product]:
    """Every product of an activated tensor in the class's methods."""
    own = scope.of_class(cls)
    functions = list(_functions(cls))
    for function in functions:
        method = _Method(function.name, own)
        method.run(function)
        if function.name == "_apply_gate" and not method.products:
            source = _text(function.body[-1])
            yield Product(function.name, function.lineno, source, "self.act_fn", "gate_up", "gate_up")
        yield from method.products
    for decorator in cls.decorator_list:
        # The decorator gives the class the default `_apply_gate`: act_fn(gate) * up.
        text = _text(decorator)
        overridden = any(function.name == "_apply_gate" for function in functions)
        if text.startswith("use_experts_implementation") and "has_gate=False" not in text and not overridden:
            yield Product("_apply_gate", cls.lineno, f"@{text}", "self.act_fn", "gate", "up")


def _functions(cls: ast.ClassDef) -> Iterable[ast.FunctionDef]:
    return (node for node in cls.body if isinstance(node, ast.FunctionDef))


class _Method(ast.NodeVisitor):
    """One function, statement by statement: which names hold an activated tensor, and where one is multiplied."""

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
        # The outermost loop twice, for what one turn leaves to the next.
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
        function, arguments = _text(node.func), node.args
        activation = self.scope.names_activation(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _MULTIPLIES:
            factors = arguments if function.startswith("torch.") else [node.func.value, *arguments]
            for one, other in zip(factors, factors[1:], strict=False):
                self._multiplied(node, one, other)
        elif function in self.scope.gated_functions:
            self.products.append(self._product(node, self.scope.gated_functions[function].activation, *_texts(node)))
        elif activation in _WHOLE_UNITS or (activation and self._is_two_tensors(function, arguments)):
            written = self._as_written(node.func, activation)
            self.products.append(self._product(node, written, *_texts(node)))

    def activated(self, node: ast.expr) -> Activated | None:
        """What `node` holds, when that is an activated tensor."""
        if isinstance(node, ast.Call):
            return self._activated_by_call(node)
        if isinstance(node, ast.Name | ast.Attribute):
            return self.holding.get(_text(node))
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
            return Activated(self._as_written(node.func, activation), _text(arguments[0]) if arguments else "")
        name = node.func.attr if is_method else getattr(node.func, "id", "")
        if not _HANDS_ON.fullmatch(name):
            return None
        lists = [item for arg in node.args for item in (arg.elts if isinstance(arg, ast.List | ast.Tuple) else [arg])]
        return self._first([*([node.func.value] if is_method else []), *lists])

    def _as_written(self, function: ast.expr, activation: str) -> str:
        # An attribute can be looked up on an instance; a local name says less than what it was made from.
        text = _text(function)
        return text if text.startswith("self.") else activation

    def _first(self, nodes: Iterable[ast.expr]) -> Activated | None:
        return next(filter(None, map(self.activated, nodes)), None)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
            for one, its in zip(target.elts, values, strict=False):
                self._assign(one, its)
            return
        name = _text(target.value if isinstance(target, ast.Subscript) else target)
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
                self.products.append(self._product(node, held.activation, held.argument, _text(other)))
                return

    def _product(self, node: ast.expr, activation: str, argument: str, other: str) -> Product:
        return Product(self.name, node.lineno, _text(node), activation, argument, other)

    def _is_two_tensors(self, function: str, arguments: list[ast.expr]) -> bool:
        is_own = function.startswith("self.") and len(arguments) == 2
        return is_own and not any(_is_number(argument) for argument in arguments)


def _texts(node: ast.Call) -> tuple[str, str]:
    texts = [_text(argument) for argument in node.args] or [""]
    return texts[0], texts[-1]


def _text(node: ast.AST) -> str:
    # Dotted names are most of what is asked for, and ast.unparse is slow.
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
        return f"{_text(node.value)}.{node.attr}"
    return ast.unparse(node)


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and _is_number(node.operand))
