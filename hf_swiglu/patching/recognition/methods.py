"""The methods of a class that multiply, and values of names and attributes in them, found without running code."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hf_swiglu.patching.recognition.gated_products import Chain, Gated, chains_at, gated_at
from hf_swiglu.patching.recognition.method_source import NoSource, mangled, method_tree
from hf_swiglu.patching.recognition.variable_uses import Flow

# Modules with long methods that do not belong to a model.
_FOREIGN = ("torch.", "transformers.modeling_utils", "transformers.generation.")
UNKNOWN = object()

Reading = Gated | Chain


@dataclass(frozen=True)
class Analysis:
    """The readings of each product in one function, or the reason why its source cannot be read."""

    flow: Flow | None
    readings: tuple[tuple[Reading, ...], ...]
    reason: str | None = None


@dataclass(frozen=True)
class Method:
    """A class's own function that multiplies. `inner` is the function that decorators wrap, or `function` itself."""

    owner: type[nn.Module]
    name: str
    function: types.FunctionType
    inner: types.FunctionType
    analysis: Analysis


_analyses: weakref.WeakKeyDictionary[types.FunctionType, Analysis] = weakref.WeakKeyDictionary()


def methods_of(cls: type[nn.Module]) -> Iterator[Method]:
    """The methods of `cls` and its bases below `nn.Module` that an instance may run and that multiply."""
    overridden: set[str] = set()
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if owner.__module__.startswith(_FOREIGN):
            continue
        for name, function in list(vars(owner).items()):
            if name in overridden or name.startswith("__"):
                continue
            inner = inspect.unwrap(function) if isinstance(function, types.FunctionType) else None
            if not isinstance(inner, types.FunctionType):
                overridden.add(name)
                continue
            if not _names(inner.__code__, "super"):
                overridden.add(name)
            if _multiplies(inner.__code__):
                yield Method(owner, name, function, inner, _analysed(inner))


def _analysed(function: types.FunctionType) -> Analysis:
    if function not in _analyses:
        _analyses[function] = _analyse(function)
    return _analyses[function]


def _analyse(function: types.FunctionType) -> Analysis:
    code = function.__code__
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return Analysis(None, (), "it is a generator")
    if any(_names(code, name) for name in ("locals", "vars", "eval", "exec", "_getframe")):
        return Analysis(None, (), "it may inspect its own local names")
    try:
        flow = Flow(method_tree(function))
    except NoSource as reason:
        return Analysis(None, (), str(reason))
    if not flow.owner:
        return Analysis(None, (), "its arguments do not name the module")
    found = ((*chains_at(node, flow), *gated_at(node)) for node in ast.walk(flow.definition))
    return Analysis(flow, tuple(readings for readings in found if readings))


def _multiplies(code: types.CodeType) -> bool:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("BINARY_MULTIPLY", "INPLACE_MULTIPLY") or instruction.argval in ("mul", "multiply"):
            return True
        if (
            instruction.opname == "BINARY_OP"
            and instruction.argrepr.startswith("*")
            and "**" not in instruction.argrepr
        ):
            return True
    return any(_multiplies(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))


def _names(code: types.CodeType, name: str) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return name in code.co_names or any(_names(constant, name) for constant in inner)


def value_of(expression: ast.expr, method: Method, module: nn.Module) -> object:
    """The value of a name in `method` for `module`, found without running code; UNKNOWN where that is not possible.

    For a container, such as the `nn.ModuleList` of `self.acts[i]`, the first element.
    """
    flow = method.analysis.flow
    assert flow is not None
    if isinstance(expression, ast.Name):
        if expression.id == flow.owner:
            return module
        values = flow.values_of(expression.id)
        if values is None or expression.id in flow.parameters or len(values) > 1:
            return UNKNOWN
        return value_of(values[0], method, module) if values else free_value(expression.id, method.inner)
    if isinstance(expression, ast.Attribute):
        return attribute_of(value_of(expression.value, method, module), mangled(expression.attr, method.inner))
    if isinstance(expression, ast.Subscript):
        return _first(value_of(expression.value, method, module), expression.slice)
    if isinstance(expression, ast.Call) and not expression.args and not expression.keywords:
        cls = value_of(expression.func, method, module)
        from_torch = isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith("torch.nn.")
        return cls() if from_torch else UNKNOWN
    return UNKNOWN


def free_value(name: str, function: types.FunctionType) -> object:
    """The value of a name that `function` does not bind, from its closure, its globals or the builtins."""
    if name in function.__code__.co_freevars:
        try:
            return (function.__closure__ or ())[function.__code__.co_freevars.index(name)].cell_contents
        except ValueError:
            return UNKNOWN
    return function.__globals__.get(name, getattr(builtins, name, UNKNOWN))


def attribute_of(value: object, name: str) -> object:
    """`value.name`, without running a property; UNKNOWN where it cannot be determined."""
    if value is UNKNOWN:
        return UNKNOWN
    if isinstance(value, nn.Module):
        for table in (vars(value), value._modules, value._parameters, value._buffers):
            if name in table:
                return table[name]
    # `getattr` would run properties.
    found = inspect.getattr_static(value, name, UNKNOWN)
    return found.__func__ if isinstance(found, staticmethod) else found


def _first(value: object, index: ast.expr) -> object:
    if isinstance(value, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return next(iter(value._modules.values()), UNKNOWN)
    if isinstance(value, (list, tuple)):
        return value[0] if value else UNKNOWN
    if isinstance(value, dict) and isinstance(index, ast.Constant) and index.value in value:
        return value[index.value]
    return UNKNOWN
