"""The variables of one function: the statements that define them and the expressions that use them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


@dataclass(frozen=True)
class Place:
    """A statement, as the element `at` of the list `block`."""

    block: list[ast.stmt]
    at: int

    @property
    def statement(self) -> ast.stmt:
        return self.block[self.at]


class Flow:
    """Names, statements and their order in one function definition. Nodes are compared by identity."""

    def __init__(self, definition: ast.FunctionDef):
        self.definition = definition
        arguments = definition.args
        positional = [*arguments.posonlyargs, *arguments.args]
        # The method's name for the module: nearly always "self".
        self.owner = positional[0].arg if positional else ""
        others = [*positional[1:], *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.parameters = {argument.arg for argument in others if argument is not None}
        self.parents: dict[int, ast.AST] = {}
        self._places: dict[int, Place] = {}
        self._names: dict[str, list[ast.Name]] = {}
        for node in ast.walk(definition):
            for child in ast.iter_child_nodes(node):
                self.parents[id(child)] = node
            for block in _blocks(node):
                self._places.update((id(statement), Place(block, at)) for at, statement in enumerate(block))
            if isinstance(node, ast.Name):
                self._names.setdefault(node.id, []).append(node)

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (parent := self.parents.get(id(node))) is not None:
            yield parent
            node = parent

    def place(self, node: ast.AST) -> Place:
        """The innermost statement that contains the node."""
        for candidate in (node, *self.ancestors(node)):
            if id(candidate) in self._places:
                return self._places[id(candidate)]
        raise LookupError(ast.unparse(node))

    def repeats(self, node: ast.AST) -> bool:
        """Whether the node may run more than once in a call, or later: in a loop or in a nested function."""
        inner = (*_LOOPS, *_SCOPES, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return any(isinstance(parent, inner) and parent is not self.definition for parent in self.ancestors(node))

    def definition_of(self, uses: Iterable[ast.Name]) -> Place | None:
        """The plain assignment that defines these uses of one name, if it defines no other use."""
        uses = list(uses)
        name, place = uses[0].id, self.place(uses[0])
        if any(self.place(use) != place for use in uses) or self._is_shared(name) or self.repeats(uses[0]):
            return None
        before = [at for at in range(place.at) if name in stored_names(place.block[at])]
        if not before or not _assigns(place.block[before[-1]]):
            return None
        at = before[-1]
        after = [i for i in range(at + 1, len(place.block)) if name in stored_names(place.block[i])]
        inside = place.block[at + 1 : after[0] + 1 if after else None]
        if after and not _assigns(place.block[after[0]]):
            return None
        reached = [node for statement in inside for node in ast.walk(statement) if _loads(node, name)]
        if not after:
            # The value may also be read after this block.
            block = {id(node) for statement in place.block for node in ast.walk(statement)}
            reached += [node for node in self._names[name] if _loads(node, name) and id(node) not in block]
        return Place(place.block, at) if {id(node) for node in reached} == {id(use) for use in uses} else None

    def sole_use(self, name: str, place: Place) -> ast.Name | None:
        """The only use of the value that the statement at `place` assigns to `name`, if there is exactly one."""
        for statement in place.block[place.at + 1 :]:
            uses = [node for node in ast.walk(statement) if _loads(node, name)]
            if uses:
                (use, *others) = uses
                assert isinstance(use, ast.Name)
                return use if not others and self.definition_of([use]) == place else None
        return None

    def is_sole_use(self, uses: Iterable[ast.Name]) -> bool:
        """Whether the name's value has only these uses in the function, none of which may run twice."""
        uses = list(uses)
        name = uses[0].id
        loads = {id(node) for node in self._names[name] if _loads(node, name)}
        once = not self._is_shared(name) and not any(map(self.repeats, uses))
        return once and (loads == {id(use) for use in uses} or self.definition_of(uses) is not None)

    def values_of(self, name: str) -> list[ast.expr] | None:
        """Every expression assigned to the name, or to a tuple with it; None where another statement binds it."""
        values = []
        for node in self._names.get(name, ()):
            if not isinstance(node.ctx, ast.Load):
                target = next((parent for parent in self.ancestors(node) if isinstance(parent, ast.stmt)), None)
                if not isinstance(target, (ast.Assign, ast.AnnAssign)) or target.value is None:
                    return None
                values.append(target.value)
        return values

    def is_constant(self, name: str) -> bool:
        """Whether the name is a parameter that is never assigned to."""
        return name in self.parameters and not any(
            isinstance(node.ctx, (ast.Store, ast.Del)) for node in self._names.get(name, ())
        )

    def _is_shared(self, name: str) -> bool:
        """Whether a nested function, or another scope, uses the name too."""
        for node in ast.walk(self.definition):
            if isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names:
                return True
            is_inner = isinstance(node, _SCOPES) and node is not self.definition
            if is_inner and any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node)):
                return True
        return False


def stored_names(statement: ast.stmt) -> set[str]:
    """The names that a statement, or one inside it, may bind or delete."""
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del))
    }


def target_name(statement: ast.stmt) -> str | None:
    """The name that the statement assigns to, if it is a single one."""
    names = target_names(statement)
    return names[0] if names is not None and len(names) == 1 and not isinstance(_target(statement), ast.Tuple) else None


def first_target(statement: ast.stmt) -> str:
    """The first name that an assignment binds."""
    names = target_names(statement)
    assert names
    return names[0]


def target_names(statement: ast.stmt) -> list[str] | None:
    """The names that an assignment binds; None where it binds any other target."""
    target = _target(statement)
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(names) == len(parts) else None


def _target(statement: ast.stmt) -> ast.expr | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return statement.targets[0]
    return statement.target if isinstance(statement, ast.AnnAssign) and statement.value is not None else None


def same(a: ast.AST | None, b: ast.AST | None) -> bool:
    """Whether two expressions have equal syntax trees."""
    return a is not None and b is not None and ast.dump(a) == ast.dump(b)


def _assigns(statement: ast.stmt) -> bool:
    """Whether the statement only assigns to names: `a = ...` or `a, b = ...`."""
    if isinstance(statement, ast.AnnAssign):
        return isinstance(statement.target, ast.Name) and statement.value is not None
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    (target,) = statement.targets
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    plain = all(isinstance(part, ast.Name) for part in parts)
    return plain and not any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement.value))


def _loads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
