"""The gated products in a method's source: an activation's result times another tensor, with the statements around it.

There are two forms. A `Gated` is one expression,

    act(gate) * up        up * act(gate)        torch.mul(act(gate), up)

A `Chain` is a product with operations on gate and up in the statements before it, such as

    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    return self.down_proj(self.act_fn(gate) * up)

It is one member of the family in `reference.GLUParams`, and its packed tensor need not be split. The rewritten method
does not assign the names of the replaced statements, which have no other use.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_swiglu.patching.recognition import expression_patterns as patterns
from hf_swiglu.patching.recognition.variable_uses import Flow, Place, first_target, stored_names, target_name


@dataclass(frozen=True)
class Gated:
    """`activation(gate) * up` at `node`, in either order."""

    node: ast.expr
    activation: ast.expr
    gate: ast.expr
    up: ast.expr
    up_first: bool
    # The function that multiplies, where it is not the operator.
    multiply: ast.expr | None


@dataclass(frozen=True)
class Chain:
    """A product at `place`, with the recognised operations on gate and up.

    `steps` are the earlier statements that it replaces, each with the statement that remains: one that computes the
    tensor from which the step starts, or None where that tensor has a name.
    """

    node: ast.expr
    place: Place
    # One of the two is None: swish is called as an activation, or written out with a sigmoid.
    activation: ast.expr | None
    sigmoid: ast.expr | None
    # Expressions of the fields of `reference.GLUParams` that are not its defaults.
    limits: dict[str, ast.expr]
    up_first: bool
    # Gate and up, or one tensor with both.
    operands: tuple[ast.expr, ...]
    layout: str | None
    # Whether gate, or the packed tensor, has a name of which this is the last read.
    is_last_use: bool
    steps: dict[int, ast.stmt | None]

    @property
    def first(self) -> int:
        return min(self.steps, default=self.place.at)


def gated_at(node: ast.AST) -> list[Gated]:
    """The readings of the node as a product: either factor may be the call of the activation."""
    factors = patterns.factors(node)
    if factors is None or not isinstance(node, ast.expr):
        return []
    first, second, multiply = factors
    return [
        Gated(node, gate.func, gate.args[0], up, up_first, multiply)
        for gate, up, up_first in ((first, second, False), (second, first, True))
        if patterns.is_plain_call(gate) and isinstance(gate, ast.Call) and not isinstance(up, ast.Constant)
    ]


def chains_at(node: ast.AST, flow: Flow) -> list[Chain]:
    """The readings of the node as a product with limits, with a swish that is written out, or of a packed tensor."""
    factors = patterns.factors(node)
    if factors is None or factors[2] is not None or not isinstance(node, ast.expr) or flow.repeats(node):
        return []
    place = flow.place(node)
    if not isinstance(place.statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)):
        return []
    read = [_Reading(flow, node, place).chain(factors[1 - at], factors[at], up_first=at == 0) for at in (1, 0)]
    return [chain for chain in read if chain is not None]


def consumer(product: ast.expr, flow: Flow) -> ast.Call | None:
    """The call whose only argument is the product, directly or by a name without other uses."""
    parent = flow.parents.get(id(product))
    value: ast.expr | None = product
    if isinstance(parent, (ast.Assign, ast.AnnAssign)):
        name = target_name(parent)
        value = flow.sole_use(name, flow.place(parent)) if name else None
        parent = flow.parents.get(id(value)) if value is not None else None
    if isinstance(parent, ast.Call) and patterns.is_plain_call(parent) and parent.args[0] is value:
        return parent
    return None


def first_projection(product: Gated, flow: Flow) -> ast.Call | None:
    """The call that computes the operand evaluated first, in the product or by a name without other uses."""
    operand: ast.expr | None = product.up if product.up_first else product.gate
    if isinstance(operand, ast.Name):
        place = flow.definition_of([operand])
        operand = place.statement.value if place is not None else None  # type: ignore[attr-defined]
    return operand if isinstance(operand, ast.Call) and patterns.is_plain_call(operand) else None


class _Side:
    """The unmatched part of a factor, its uses where it is a name, and the step that contains it, if any."""

    def __init__(self, expression: ast.expr):
        self.expression, self.uses = expression, [expression]
        self.step: int | None = None

    def replace(self, expression: ast.expr, uses: list[ast.expr] | None = None) -> None:
        self.expression, self.uses = expression, uses or [expression]


class _Reading:
    """One attempt to read a product as a chain, by matching operations on either factor from the outside in."""

    def __init__(self, flow: Flow, node: ast.expr, place: Place):
        self._flow, self._node, self._place = flow, node, place
        self._limits: dict[str, ast.expr] = {}
        self._steps: dict[int, ast.stmt | None] = {}

    def chain(self, gate: ast.expr, up: ast.expr, *, up_first: bool) -> Chain | None:
        gates, ups = _Side(gate), _Side(up)
        self._match_limit(gates, patterns.upper_limit, "act_limit")
        activation = sigmoid = None
        swish = self._match(gates, patterns.written_swish)
        if swish is not None:
            sigmoid, uses, alpha = swish
            gates.replace(uses[0], uses)
            if alpha is not None:
                self._limits["alpha"] = alpha
        else:
            call = self._match(gates, lambda expression: expression if patterns.is_plain_call(expression) else None)
            if call is None:
                return None
            activation = call.func
            gates.replace(call.args[0])
        self._match_limit(gates, patterns.upper_limit, "gate_limit")
        self._match_limit(ups, patterns.offset, "up_offset")
        self._match_limit(ups, patterns.symmetric_limit, "up_limit")
        operands, layout, is_last_use = self._operands(gates, ups)
        if not (self._limits or self._steps or sigmoid) or not all(map(self._is_invariant, self._limits.values())):
            return None
        chain = Chain(
            self._node, self._place, activation, sigmoid, self._limits, up_first, operands, layout, is_last_use,
            self._steps,
        )  # fmt: skip
        # No other statement may run between the steps: it could write to the tensors that they read.
        together = set(range(chain.first, self._place.at)) == self._steps.keys()
        return chain if together and all(self._is_bound(operand, chain) for operand in operands) else None

    def _match(self, side: _Side, pattern: Callable[[ast.expr], Any]) -> Any:
        """The match of `pattern` with the side, or with the expression assigned to its name."""
        found = pattern(side.expression)
        if found is not None or not isinstance(side.expression, ast.Name):
            return found
        place = self._flow.definition_of(side.uses)
        if place is None or place.block is not self._place.block or target_name(place.statement) is None:
            return None
        found = pattern(place.statement.value)  # type: ignore[attr-defined]
        if found is not None:
            self._steps[place.at] = None
            side.step = place.at
        return found

    def _match_limit(
        self, side: _Side, pattern: Callable[[ast.expr], tuple[ast.expr, ast.expr] | None], limit: str
    ) -> None:
        found = self._match(side, pattern)
        if found is not None:
            inner, self._limits[limit] = found
            side.replace(inner)

    def _operands(self, gate: _Side, up: _Side) -> tuple[tuple[ast.expr, ...], str | None, bool]:
        """(operands, layout, whether this is the last read of the first one's name)"""
        packed = self._packed(gate, up)
        if packed is None:
            return (self._leaf(gate), self._leaf(up)), None, self._is_last_use(gate)
        side, layout = packed
        return (self._leaf(side),), layout, self._is_last_use(side)

    def _packed(self, gate: _Side, up: _Side) -> tuple[_Side, str] | None:
        """The packed tensor and its layout, where one statement splits it into just these two."""
        if not isinstance(gate.expression, ast.Name) or not isinstance(up.expression, ast.Name):
            return None
        places = [self._flow.definition_of(side.uses) for side in (gate, up)]
        if places[0] is None or places[0] != places[1] or places[0].block is not self._place.block:
            return None
        cut = patterns.halves(places[0].statement, gate.expression.id, up.expression.id)
        if cut is None:
            return None
        packed, layout, uses = cut
        side = _Side(packed)
        side.replace(packed, uses)
        side.step = places[0].at
        self._steps[side.step] = None
        return side, layout

    def _leaf(self, side: _Side) -> ast.expr:
        """The tensor from which a side starts. One without a name is still computed in its step."""
        if side.step is None or isinstance(side.expression, ast.Name):
            return side.expression
        statement = self._place.block[side.step]
        name = target_name(statement) or first_target(statement)
        kept = ast.Assign([ast.Name(name, ast.Store())], side.expression)
        self._steps[side.step] = ast.copy_location(kept, statement)
        return ast.copy_location(ast.Name(name, ast.Load()), self._node)

    def _is_last_use(self, side: _Side) -> bool:
        if not isinstance(side.expression, ast.Name):
            # A step assigns it to a name without other uses.
            return side.step is not None
        return self._flow.is_sole_use(side.uses)

    def _is_invariant(self, limit: ast.expr) -> bool:
        """Whether a limit has the same value before the steps: a number, an attribute of the module, or a parameter."""
        root = limit
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name):
            return (root.id == self._flow.owner and root is not limit) or self._flow.is_constant(root.id)
        return isinstance(limit, ast.Constant)

    def _is_bound(self, operand: ast.expr, chain: Chain) -> bool:
        """Whether a named operand has the same value at the product without the steps."""
        if not isinstance(operand, ast.Name):
            return True
        made = [step for step in chain.steps.values() if step is not None and operand.id in stored_names(step)]
        if not any(node is operand for node in ast.walk(self._flow.definition)):
            return len(made) == 1
        return not made
