"""An abstract interpreter for `rowwise_proof`: one call of a function, statement by statement, with values of rows."""

from __future__ import annotations

import ast
import inspect
import operator
import types
from typing import Any

from torch import Tensor, nn

from hf_swiglu.patching.memory import child_modules
from hf_swiglu.patching.memory.rowwise_operators import (
    FUNCTIONS,
    LINEAR,
    METHODS,
    OF_ROWS_ALONE,
    OF_WEIGHTS,
    REDUCTIONS,
    SPLITS,
    acts_on_last_dimension,
)
from hf_swiglu.patching.recognition.method_source import mangled
from hf_swiglu.patching.recognition.methods import UNKNOWN, attribute_of, free_value

_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
_PURE = (int, float, bool, min, max, len, isinstance, getattr, hasattr)


class NotShown(Exception):
    """A run of the forward may have side effects; the message states which."""


class _Rows:
    """The abstract value of an expression that depends on the input, or of an unknown tensor."""

    def __init__(self, name: str):
        self.name = name


ROWS, CUT, SHAPE = _Rows("rows"), _Rows("several tensors of rows"), _Rows("a shape")
# A tensor of unknown shape that does not depend on the input.
OTHER = _Rows("another tensor")


def _has(values: Any, *markers: _Rows) -> bool:
    """By identity: the value of an expression may be a tensor, which compares element by element."""
    return any(value is marker for value in values for marker in markers)


class Scope:
    """One call of a function: its names, and its return value."""

    def __init__(self, reading: Any, function: types.FunctionType, values: dict[str, Any], depth: int):
        self._reading, self._function, self._values, self._depth = reading, function, values, depth
        self._returned: list[Any] = []

    def result(self) -> Any:
        first, *others = self._returned or [None]
        return first if all(other is first for other in others) else UNKNOWN

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return):
            self._returned.append(None if statement.value is None else self.value(statement.value))
        elif isinstance(statement, ast.Expr):
            self.value(statement.value)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement.targets[0], self.value(statement.value))
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            self._assign(statement.target, self.value(statement.value))
        elif isinstance(statement, ast.If):
            self._branch(statement)
        elif not isinstance(statement, ast.Pass):
            raise NotShown(f"its {self._function.__name__} has a statement of the kind {type(statement).__name__}")

    def _branch(self, statement: ast.If) -> None:
        if _has([self.value(statement.test)], ROWS, CUT, SHAPE):
            raise NotShown(f"its {self._function.__name__} branches on the input")
        before = dict(self._values)
        self.run(statement.body)
        after, self._values = self._values, before
        self.run(statement.orelse)
        for name in after.keys() | self._values.keys():
            if after.get(name, UNKNOWN) is not self._values.get(name, UNKNOWN):
                self._values[name] = UNKNOWN

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._values[target.id] = value
        elif isinstance(target, ast.Tuple) and all(isinstance(part, ast.Name) for part in target.elts):
            for part in target.elts:
                self._values[part.id] = ROWS if value is CUT else UNKNOWN  # type: ignore[attr-defined]
        else:
            raise NotShown(f"its {self._function.__name__} writes to {ast.unparse(target)}")

    def value(self, node: ast.expr) -> Any:
        """The value of an expression: an instance of `_Rows`, an object, or UNKNOWN."""
        reader = getattr(self, f"_{type(node).__name__.lower()}", None)
        if reader is None:
            raise NotShown(f"its {self._function.__name__} has an expression of the kind {type(node).__name__}")
        return reader(node)

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id in self._values:
            return self._values[node.id]
        return free_value(node.id, self._function)

    def _attribute(self, node: ast.Attribute) -> Any:
        value = self.value(node.value)
        if value is ROWS:
            return SHAPE if node.attr == "shape" else UNKNOWN
        return UNKNOWN if isinstance(value, _Rows) else attribute_of(value, mangled(node.attr, self._function))

    def _tuple(self, node: ast.Tuple) -> Any:
        values = [self.value(part) for part in node.elts]
        return CUT if values and all(value is ROWS for value in values) else UNKNOWN

    def _binop(self, node: ast.BinOp) -> Any:
        values = self.value(node.left), self.value(node.right)
        compute = _ARITHMETIC.get(type(node.op))
        if compute is not None and all(type(value) in (int, float) for value in values):
            try:
                return compute(*values)
            except ArithmeticError:
                return UNKNOWN
        return self._combined(*values, matrix=isinstance(node.op, ast.MatMult))

    def _compare(self, node: ast.Compare) -> Any:
        if all(isinstance(each, (ast.Is, ast.IsNot)) for each in node.ops):
            return UNKNOWN
        return self._combined(*(self.value(each) for each in (node.left, *node.comparators)))

    def _boolop(self, node: ast.BoolOp) -> Any:
        values = [self.value(part) for part in node.values]
        return ROWS if any(isinstance(value, _Rows) for value in values) else UNKNOWN

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if type(value) in (int, float) and isinstance(node.op, ast.USub):
            return -value
        return self._combined(value)

    def _ifexp(self, node: ast.IfExp) -> Any:
        if _has([self.value(node.test)], ROWS, CUT, SHAPE):
            raise NotShown(f"its {self._function.__name__} branches on the input")
        body, other = self.value(node.body), self.value(node.orelse)
        return body if body is other else UNKNOWN

    def _combined(self, *values: Any, matrix: bool = False) -> Any:
        """The value of elementwise arithmetic, or of a matrix product, of these."""
        if _has(values, CUT, SHAPE):
            return self._unclear("arithmetic with a shape or a tuple")
        if not _has(values, ROWS):
            is_tensor = any(value is OTHER or isinstance(value, Tensor) for value in values)
            return OTHER if is_tensor else UNKNOWN
        if matrix or not all(value is ROWS or acts_on_last_dimension(value) for value in values):
            self._reading.note("its input is combined with a value of unknown shape")
        return ROWS

    def _unclear(self, what: str) -> Any:
        self._reading.note(f"its forward has {what}")
        return ROWS

    def _slice(self, node: ast.Slice) -> Any:
        parts = [self.value(part) for part in (node.lower, node.upper, node.step) if part is not None]
        return self._unclear("a slice that depends on the input") if _has(parts, ROWS, CUT) else UNKNOWN

    def _subscript(self, node: ast.Subscript) -> Any:
        value = self.value(node.value)
        if value is CUT:
            return ROWS
        if value is SHAPE:
            if ast.unparse(node.slice) != "-1":
                self._reading.note("its forward reads the number of rows")
            return UNKNOWN
        if value is not ROWS:
            self.value(node.slice)
            return OTHER if value is OTHER or isinstance(value, Tensor) else UNKNOWN
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        is_last = (
            len(parts) == 2
            and isinstance(parts[0], ast.Constant)
            and parts[0].value is ...
            and isinstance(parts[1], ast.Slice)
        )
        for part in parts:
            self.value(part)
        return ROWS if is_last else self._unclear(f"the index {ast.unparse(node.slice)}")

    def _call(self, node: ast.Call) -> Any:
        if any(isinstance(part, ast.Starred) for part in node.args) or any(each.arg is None for each in node.keywords):
            raise NotShown(f"its {self._function.__name__} passes arguments by * or **")
        arguments = [self.value(argument) for argument in node.args]
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            if owner is ROWS or owner is OTHER or isinstance(owner, Tensor):
                if (
                    owner is not ROWS
                    and node.func.attr in OF_WEIGHTS
                    and not _has([*arguments, *named.values()], ROWS, CUT)
                ):
                    return OTHER
                return self._operator(METHODS, node.func.attr, node.func.attr, [owner, *arguments], named)
        function = self.value(node.func)
        if isinstance(function, nn.Module):
            return self._module(function, arguments, named)
        if isinstance(function, _FUNCTION_TYPES) and function in FUNCTIONS:
            kinds = {function.__name__: FUNCTIONS[function]}
            return self._operator(kinds, function.__name__, ast.unparse(node.func), arguments, named)
        if isinstance(function, types.FunctionType):
            return self._function_call(node, function, arguments, named)
        values = [*arguments, *named.values()]
        if any(function is pure for pure in _PURE) and not any(isinstance(value, _Rows) for value in values):
            return UNKNOWN
        raise NotShown(f"its {self._function.__name__} calls {ast.unparse(node.func)}")

    def _function_call(self, node: ast.Call, function: types.FunctionType, arguments: list, named: dict) -> Any:
        if named:
            raise NotShown(f"its {self._function.__name__} calls {ast.unparse(node.func)} with named arguments")
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            # A method found on the class of a module, not a function in one of its attributes.
            if isinstance(owner, nn.Module) and node.func.attr not in vars(owner):
                static = inspect.getattr_static(owner, mangled(node.func.attr, self._function), None)
                arguments = arguments if isinstance(static, staticmethod) else [owner, *arguments]
        return self._reading.call(function, arguments, self._depth + 1)

    def _module(self, child: nn.Module, arguments: list, named: dict) -> Any:
        if len(arguments) != 1 or named:
            raise NotShown(f"its {self._function.__name__} calls a {type(child).__name__} with several arguments")
        if getattr(child, "inplace", False) or not child_modules.has_trusted_forward(child):
            raise NotShown(f"a {type(child).__name__} in it works in place, or has a user-defined forward")
        if child_modules.updates_buffers(child):
            raise NotShown(f"a {type(child).__name__} in it may update its buffers")
        # Of pairs of hooks, such as opacus' for gradients per sample, the forward hook alone would run again.
        if hooks := child_modules.user_hooks(child):
            raise NotShown(hooks)
        reason = child_modules.not_rowwise(child)
        if reason is None:
            reason = self._module_by_source(child, arguments[0])
        reason = child_modules.hooks_over_rows(child) or reason
        if reason:
            self._reading.note(reason)
        return arguments[0] if isinstance(arguments[0], _Rows) else OTHER

    def _module_by_source(self, child: nn.Module, argument: Any) -> str:
        inner = type(self._reading)()
        try:
            returned = inner.call(type(child).forward, [child, argument], self._depth + 1)
        except NotShown:
            if not child_modules.may_run_again(child):
                raise
            return f"a {type(child).__name__} in it is not known to treat rows independently"
        return (
            inner.reason if returned is argument else f"a {type(child).__name__} in it does not return its input's rows"
        )

    def _operator(self, table: dict[str, str], name: str, shown_as: str, arguments: list, named: dict) -> Any:
        kind = table.get(name)
        if kind is None or named.get("inplace", False) is not False or "out" in named:
            raise NotShown(f"its {self._function.__name__} calls {shown_as}")
        values = [*arguments, *named.values()]
        if not _has(values, ROWS, CUT, SHAPE):
            return OTHER
        if kind == LINEAR:
            if not _has(arguments[:1], ROWS) or _has(values[1:], ROWS, CUT, SHAPE):
                return self._unclear("a matrix product of two tensors that depend on the input")
            return ROWS
        if kind in (REDUCTIONS, SPLITS):
            at = 1 if kind == REDUCTIONS else 2
            dimension = named.get("dim", arguments[at] if len(arguments) > at else None)
            is_last = type(dimension) is int and dimension == -1
            if not is_last or (kind == REDUCTIONS and named.get("keepdim") is not True):
                self._reading.note(f"its forward calls {shown_as} along dimensions other than the last")
            return CUT if kind == SPLITS else ROWS
        if kind == OF_ROWS_ALONE:
            return ROWS if _has(arguments[:1], ROWS) else self._unclear(f"a call of {shown_as}")
        return self._combined(*values)
