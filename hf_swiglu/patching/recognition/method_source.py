"""The syntax tree of a method, and a method rebuilt from a changed tree.

A tree is used only if compiling it unchanged gives the method's bytecode: the source of a file that was edited after
its import, or of code that an import hook has instrumented, is not the code that runs.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copy
import dis
import inspect
import sys
import types
from collections.abc import Iterable

_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag

_FACTORY, _CLASS = "_swiglu_factory", "_SwiGLUNoClass"
# Prefix of the name of the class around a compiled method: a method that names its own class refers to the global, and
# name mangling strips leading underscores.
_NOT_THE_CLASS = "____"
# Since Python 3.12 one instruction loads attributes and methods; the lowest bit of its argument marks methods.
_METHOD_BIT = 1 if sys.version_info >= (3, 12) else 0


# Python counts the depth of nodes for all threads together: about one call of `ast.parse` in a hundred fails with
# SystemError while other threads parse and collect garbage. https://github.com/python/cpython/issues/106905
_PARSE_ATTEMPTS = 10


class NoSource(Exception):
    """A method's source is unavailable or is not the code that runs; the message states why."""


def parsed(source: str) -> list[ast.stmt]:
    """The statements of the source, whatever other threads parse."""
    for _ in range(_PARSE_ATTEMPTS - 1):
        with contextlib.suppress(SystemError):
            return ast.parse(source).body
    return ast.parse(source).body


def method_tree(function: types.FunctionType) -> ast.FunctionDef:
    """The definition of `function`, without decorators, annotations and defaults, with the line numbers of its file.

    Raises:
        NoSource: there is no source, or it does not compile to the function's bytecode.
    """
    try:
        source = inspect.getsource(function.__code__)
        # Inside an `if` block, because dedenting would change strings that span lines.
        (block,) = parsed(source if source[:1] not in " \t" else "if True:\n" + source)
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise NoSource("its source is not available") from error
    definition = block.body[0] if isinstance(block, ast.If) else block
    if not isinstance(definition, ast.FunctionDef) or getattr(definition, "type_params", None):
        raise NoSource("it is not a plain function")
    ast.increment_lineno(definition, function.__code__.co_firstlineno - 1 - (definition is not block))
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    # Both live on the function object, not in its code.
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    code = function.__code__
    if not any(_same_code(_compile(definition, function, (), imported), code) for imported in (_imported(code), ())):
        raise NoSource("its source is not what was imported")
    return definition


def rebuild(definition: ast.FunctionDef, function: types.FunctionType, names: dict[str, object]) -> types.FunctionType:
    """`function` with the code of `definition`, in which `names` are bound as if by a closure.

    Globals, closure, defaults, file name and line numbers are those of `function`.
    """
    code = _compile(definition, function, tuple(names))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    cells |= {name: types.CellType(value) for name, value in names.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    return _with_metadata(types.FunctionType(code, function.__globals__, function.__name__, None, closure), function)


def with_closure(function: types.FunctionType, old: object, new: object) -> types.FunctionType | None:
    """A copy of a wrapper that calls `new` where `function` calls `old`; None if `old` is not in its closure."""
    closure = function.__closure__ or ()
    if not any(_holds(cell, old) for cell in closure):
        return None
    cells = tuple(types.CellType(new) if _holds(cell, old) else cell for cell in closure)
    twin = _with_metadata(
        types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells), function
    )
    twin.__wrapped__ = new  # type: ignore[attr-defined]
    return twin


def mangled(name: str, function: types.FunctionType) -> str:
    """The mangled name of a private attribute, for the class in which `function` was defined."""
    owner = _class_name(function).lstrip("_")
    return f"_{owner}{name}" if name.startswith("__") and not name.endswith("__") else name


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:
        return False


def _with_metadata(new: types.FunctionType, like: types.FunctionType) -> types.FunctionType:
    new.__defaults__, new.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    new.__annotations__ = dict(like.__annotations__)
    new.__qualname__, new.__module__, new.__doc__ = like.__qualname__, like.__module__, like.__doc__
    new.__dict__.update(like.__dict__)
    return new


def _compile(
    definition: ast.FunctionDef, function: types.FunctionType, names: tuple[str, ...], imported: Iterable[str] = ()
) -> types.CodeType:
    """The code of `definition`, compiled as `function` was: inside its class and its closure's variables."""
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    # Private names are mangled with the class's name, and `super()` needs a class around it.
    owner = ast.ClassDef(_NOT_THE_CLASS + _class_name(function), [], [], [copy.deepcopy(definition)], [])
    parameters = [ast.arg(name) for name in (*free, *names)]
    factory = ast.FunctionDef(_FACTORY, ast.arguments([], parameters, None, [], [], None, []), [owner], [], None)
    if hasattr(factory, "type_params") or "type_params" in factory._fields:
        factory.type_params, owner.type_params = [], []  # type: ignore[attr-defined]
    imports: list[ast.stmt] = [ast.Import([ast.alias(name)]) for name in imported]
    module = ast.fix_missing_locations(ast.Module([*imports, factory], []))
    flags = function.__code__.co_flags & _FUTURES
    try:
        code = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    except SyntaxError as error:
        raise NoSource(f"it cannot be compiled again: {error.msg}") from error
    for name in (_FACTORY, owner.name, definition.name):
        code = next(
            constant for constant in code.co_consts if isinstance(constant, types.CodeType) and constant.co_name == name
        )
    return code


def _imported(code: types.CodeType) -> set[str]:
    """The globals that were imported, judged by bytecode: CPython calls their attributes unlike methods."""
    names: set[str] = set()
    last = None
    for instruction in dis.get_instructions(code):
        is_attribute = instruction.opname == "LOAD_ATTR" and not (instruction.arg or 0) & _METHOD_BIT
        if is_attribute and last is not None and last.opname == "LOAD_GLOBAL":
            names.add(last.argval)
        last = instruction
    return names.union(*(_imported(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _class_name(function: types.FunctionType) -> str:
    *_, owner, _ = ("", "<locals>", *function.__qualname__.split("."))
    return _CLASS if owner == "<locals>" else owner


def _same_code(ours: types.CodeType, theirs: types.CodeType) -> bool:
    if (ours.co_code, ours.co_names, ours.co_varnames) != (theirs.co_code, theirs.co_names, theirs.co_varnames):
        return False
    if (ours.co_freevars, ours.co_cellvars) != (theirs.co_freevars, theirs.co_cellvars):
        return False
    return len(ours.co_consts) == len(theirs.co_consts) and all(
        _same_code(a, b) if isinstance(a, types.CodeType) and isinstance(b, types.CodeType) else _same_constant(a, b)
        for a, b in zip(ours.co_consts, theirs.co_consts)
    )


def _same_constant(a: object, b: object) -> bool:
    if isinstance(a, str) and isinstance(b, str) and a.startswith(_FACTORY):
        # Up to Python 3.10 the qualified name of an inner function or comprehension is a constant.
        return b.endswith(a.partition(_NOT_THE_CLASS)[2])
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        # Equal sets may be in different orders.
        return sorted(map(repr, a)) == sorted(map(repr, b))
    # As text, because 1, 1.0 and True are equal, and NaN is not.
    return type(a) is type(b) and repr(a) == repr(b)
