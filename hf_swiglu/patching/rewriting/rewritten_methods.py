"""A method with its gated products replaced by calls that decide at run time whether to fuse.

    self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))                                     becomes

    project(self.down_proj, gated(p, f, self.gate_proj(x), self.up_proj(x), False)
                            if (p := fusable(f := self.act_fn)) else f(self.gate_proj(x)) * self.up_proj(x))

and a `Chain` becomes an `if` statement with the original statements under `else`. Where the call does not fuse, the
original expressions run: the same calls, in the same order. `fused_calls`, and `recompute` or
`checkpointed_forward`, define the calls.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Sequence

from hf_swiglu.patching.recognition.gated_products import Chain, Gated, consumer, first_projection
from hf_swiglu.patching.recognition.method_source import NoSource, parsed, rebuild, with_closure
from hf_swiglu.patching.recognition.methods import Method
from hf_swiglu.patching.recognition.variable_uses import Flow, same

# Prefix of the names that rewriting adds.
_PREFIX = "_swiglu_"

_GUARD = """
if not {p}isinstance({owner}, {p}fused) or {p}class.{name} is not {p}original or {p}is_compiling():
    return {call}({p}class.{name}, {arguments})
"""


def rewrite(
    method: Method,
    products: Sequence[Gated | Chain],
    runtime: dict[str, object],
    owner: type,
    *,
    keeps_first: bool = False,
) -> types.FunctionType:
    """The method with the given products rewritten, for modules of `owner`.

    With `keeps_first`, the call of `first_projection` becomes one of `keep_output`.

    `runtime` contains the functions that rewritten code calls, and `fused`, the class of modules that run it. For other
    modules, once the method of `owner` has been replaced, or under torch.compile, the method of `owner` is called
    instead; a forward by `call_original`.

    Raises:
        NoSource: a decorator's closure does not contain the function that it wraps.
    """
    function, inner, flow, name = method.function, method.inner, method.analysis.flow, method.name
    assert flow is not None
    definition = _Copy(flow, products, keeps_first).definition()
    names = {_PREFIX + key: value for key, value in runtime.items()}
    names |= {_PREFIX + "class": owner, _PREFIX + "original": function, _PREFIX + "isinstance": isinstance}
    if inner is function:
        _insert_guard(definition, flow, name)
        return rebuild(definition, function, names)
    # The guard has to run before the decorators' own code.
    new: types.FunctionType = rebuild(definition, inner, names)
    for old, wrapper in _wrappers(function):
        wrapped = with_closure(wrapper, old, new)
        if wrapped is None:
            raise NoSource(f"the decorator of {name} does not hold it in a closure")
        new = wrapped
    return _guarded(new, function, runtime, owner, name)


def _wrappers(function: types.FunctionType) -> list[tuple[object, types.FunctionType]]:
    """(wrapped, wrapper) from the innermost decorator outwards."""
    pairs: list[tuple[object, types.FunctionType]] = []
    while hasattr(function, "__wrapped__"):
        pairs.append((function.__wrapped__, function))
        function = function.__wrapped__
    return pairs[::-1]


def _guarded(new, function, runtime: dict, owner: type, name: str) -> types.FunctionType:
    fused, is_compiling = runtime["fused"], runtime["is_compiling"]

    def guarded(self, *args, **kwargs):
        if not isinstance(self, fused) or getattr(owner, name) is not function or is_compiling():
            return getattr(owner, name)(self, *args, **kwargs)
        return new(self, *args, **kwargs)

    for attribute in ("__module__", "__name__", "__qualname__", "__doc__", "__wrapped__"):
        setattr(guarded, attribute, getattr(new, attribute))
    return guarded


def _insert_guard(definition: ast.FunctionDef, flow: Flow, name: str) -> None:
    arguments = definition.args
    given = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    given += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    given += [f"{argument.arg}={argument.arg}" for argument in arguments.kwonlyargs]
    given += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    call = _PREFIX + ("call_original" if name == "forward" else "call")
    text = _GUARD.format(p=_PREFIX, owner=flow.owner, name=name, arguments=", ".join(given), call=call)
    guard = parsed(text)
    has_docstring = ast.get_docstring(definition, clean=False) is not None
    for statement in guard:
        for node in ast.walk(statement):
            ast.copy_location(node, definition.body[0])
    definition.body[has_docstring:has_docstring] = guard


class _Copy:
    """Copies a definition and replaces its products."""

    def __init__(self, flow: Flow, chosen: Sequence[Gated | Chain], keeps_first: bool):
        self._flow, self._count = flow, 0
        self._gated = {id(product.node): product for product in chosen if isinstance(product, Gated)}
        self._chains: dict[int, list[Chain]] = {}
        for product in chosen:
            if isinstance(product, Chain):
                self._chains.setdefault(id(product.place.block), []).append(product)
        firsts = [first_projection(product, flow) for product in chosen if keeps_first and isinstance(product, Gated)]
        self._kept = {id(call) for call in firsts if call is not None}
        consumers = [consumer(product.node, flow) for product in chosen]
        self._consumers = {id(call) for call in consumers if call is not None}
        self._consumer_paths = {
            id(product.node): self._own_path(call.func) for product, call in zip(chosen, consumers) if call is not None
        }
        # The call that replaces a chain's product, while its statement is copied.
        self._replaced: dict[int, ast.expr] = {}

    def definition(self) -> ast.FunctionDef:
        result = self._plain(self._flow.definition)
        assert isinstance(result, ast.FunctionDef)
        return ast.fix_missing_locations(result)

    def _own_path(self, node: ast.expr) -> str | None:
        """ "down_proj" of `self.down_proj`; None for any other expression."""
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        return ".".join(reversed(names)) if names and same(node, _load(self._flow.owner)) else None

    def _node(self, node: ast.AST) -> ast.AST:
        if id(node) in self._replaced:
            return self._replaced[id(node)]
        if id(node) in self._gated:
            return self._located(self._fused(self._gated[id(node)]), node)
        if id(node) in self._consumers or id(node) in self._kept:
            assert isinstance(node, ast.Call)
            arguments = [self._expression(node.func), self._expression(node.args[0])]
            return self._located(_call("keep_output" if id(node) in self._kept else "project", *arguments), node)
        return self._plain(node)

    def _plain(self, node: ast.AST) -> ast.AST:
        fields = {}
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                fields[name] = self._block(value)
            elif isinstance(value, list):
                fields[name] = [self._node(item) if isinstance(item, ast.AST) else item for item in value]
            else:
                fields[name] = self._node(value) if isinstance(value, ast.AST) else value
        return ast.copy_location(type(node)(**fields), node)

    def _expression(self, node: ast.expr) -> ast.expr:
        result = self._node(node)
        assert isinstance(result, ast.expr)
        return result

    def _block(self, block: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        at = 0
        for chain in sorted(self._chains.get(id(block), ()), key=lambda chain: chain.first):
            result += [self._node(statement) for statement in block[at : chain.first]]  # type: ignore[misc]
            result.append(self._branch(chain, block))
            at = chain.place.at + 1
        return result + [self._node(statement) for statement in block[at:]]  # type: ignore[misc]

    def _branch(self, chain: Chain, block: list[ast.stmt]) -> ast.If:
        product, activation = self._local("p"), self._local("f")
        given = {name: copy.deepcopy(limit) for name, limit in chain.limits.items()}
        if chain.sigmoid is not None:
            given["sigmoid"] = copy.deepcopy(chain.sigmoid)
        called: ast.expr = ast.Constant(None)
        if chain.activation is not None:
            called = ast.NamedExpr(ast.Name(activation, ast.Store()), copy.deepcopy(chain.activation))
        test = ast.NamedExpr(ast.Name(product, ast.Store()), _call("family", called, **given))
        statement = block[chain.place.at]
        passed = ast.Constant(None) if chain.activation is None else _load(activation)
        self._replaced[id(chain.node)] = self._located(self._chained(chain, _load(product), passed), chain.node)
        kept = [copy.deepcopy(step) for _, step in sorted(chain.steps.items()) if step is not None]
        body = [*kept, self._node(statement)]
        del self._replaced[id(chain.node)]
        original = copy.deepcopy(block[chain.first : chain.place.at + 1])
        return self._located(ast.If(test, body, original), statement)  # type: ignore[return-value]

    def _chained(self, chain: Chain, product: ast.expr, activation: ast.expr) -> ast.expr:
        operands = [copy.deepcopy(operand) for operand in chain.operands]
        last = ast.Constant(chain.is_last_use)
        if chain.layout is not None:
            # The consumer is looked up only where it is needed: that takes 0.6 us.
            path = self._consumer_paths.get(id(chain.node))
            consumer = [_load(self._flow.owner), ast.Constant(path)] if path else []
            return _call("packed", product, activation, *operands, ast.Constant(chain.layout), last, *consumer)
        names = ["up", "gate"] if chain.up_first else ["gate", "up"]
        named = dict(zip(("gate", "up"), operands))
        return _call("chained", product, activation, last, **{name: named[name] for name in names})

    def _fused(self, gated: Gated) -> ast.expr:
        last = self._is_last_use(gated.gate)
        multiply = [] if gated.multiply is None else [copy.deepcopy(gated.multiply)]
        if gated.up_first:
            operands = [self._expression(part) for part in (gated.up, gated.activation, gated.gate)]
            return _call("times", *operands, ast.Constant(last), *multiply)
        product, activation = self._local("p"), self._local("f")
        called = ast.NamedExpr(ast.Name(activation, ast.Store()), self._expression(gated.activation))
        test = ast.NamedExpr(ast.Name(product, ast.Store()), _call("fusable", called, *multiply))
        operands = [self._expression(part) for part in (gated.gate, gated.up)]
        fused = _call("gated", _load(product), _load(activation), *operands, ast.Constant(last))
        first = ast.Call(_load(activation), [self._expression(gated.gate)], [])
        second = self._expression(gated.up)
        plain: ast.expr
        if gated.multiply is None:
            plain = ast.BinOp(first, ast.Mult(), second)
        else:
            plain = ast.Call(copy.deepcopy(gated.multiply), [first, second], [])
        return ast.IfExp(test, fused, plain)

    def _is_last_use(self, gate: ast.expr) -> bool:
        return isinstance(gate, ast.Name) and self._flow.is_sole_use([gate])

    def _local(self, kind: str) -> str:
        self._count += 1
        return f"{_PREFIX}{kind}{self._count}"

    def _located(self, new: ast.expr | ast.stmt, node: ast.AST):
        """`new`, with the line numbers of `node` where it has none: tracebacks point to the original."""
        for part in ast.walk(new):
            if isinstance(part, (ast.expr, ast.stmt, ast.keyword)) and not hasattr(part, "lineno"):
                ast.copy_location(part, node)
        return new


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _call(name: str, *arguments: ast.expr, **named: ast.expr) -> ast.Call:
    keywords = [ast.keyword(key, value) for key, value in named.items()]
    return ast.Call(_load(_PREFIX + name), list(arguments), keywords)
