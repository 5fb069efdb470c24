"""The source scan: every class of the installed transformers that multiplies an activated tensor by another.

It reads the text of `modeling_*.py` and imports nothing, so it is independent of recognition. It is deliberately
over-inclusive: an activation is any callable with such a name or built from one, and the other factor any expression
but a number. `not_mlp_gates` then excludes products that belong to no MLP.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from tools.model_support.activated_products import Product, module_scope, products_of, top_level


@dataclass(frozen=True)
class ScannedClass:
    """One class of the scan, with every product that was found in it."""

    module: str
    name: str
    products: tuple[Product, ...]

    @property
    def family(self) -> str:
        return self.module.split(".")[-2]

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


def modeling_files() -> dict[str, Path]:
    """Module name -> source file, of every `modeling_*.py` below `transformers.models`."""
    root = Path(find_spec("transformers").origin).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return {f"transformers.models.{file.parent.name}.{file.stem}": file for file in files}


def scan() -> dict[tuple[str, str], ScannedClass]:
    """(module, class) -> its products, over all modeling files."""
    return scan_sources({module: file.read_text(encoding="utf-8") for module, file in modeling_files().items()})


def scan_sources(sources: dict[str, str]) -> dict[tuple[str, str], ScannedClass]:
    """`scan` of these sources, by module name."""
    found: dict[tuple[str, str], ScannedClass] = {}
    bases: dict[tuple[str, str], list[tuple[str, str]]] = {}
    methods: dict[tuple[str, str], set[str]] = {}
    for module, source in sources.items():
        tree, lines = ast.parse(source), source.splitlines()
        scope = module_scope(tree)
        imported = _imported_classes(tree, module)
        for cls in (node for node in top_level(tree) if isinstance(node, ast.ClassDef)):
            key = (module, cls.name)
            bases[key] = [imported.get(ast.unparse(base), (module, ast.unparse(base))) for base in cls.bases]
            methods[key] = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
            products = tuple(products_of(cls, scope, lines))
            if products:
                found[key] = ScannedClass(module, cls.name, products)
    return dict(sorted(_with_inherited(found, bases, methods).items()))


def _with_inherited(found, bases, methods) -> dict[tuple[str, str], ScannedClass]:
    """Adds the classes that inherit a method with a product and do not override it."""

    def products(key: tuple[str, str], seen: frozenset = frozenset()) -> Iterable[Product]:
        if key in found:
            yield from found[key].products
        for base in bases.get(key, []):
            if base not in seen:
                inherited = products(base, seen | {key})
                yield from (
                    replace(product, inherited_from=product.inherited_from or base[1])
                    for product in inherited
                    if product.method not in methods[key]
                )

    every = {key: tuple(products(key)) for key in bases}
    return {key: ScannedClass(*key, found_there) for key, found_there in every.items() if found_there}


def _imported_classes(tree: ast.Module, module: str) -> dict[str, tuple[str, str]]:
    """Local name -> (module, class), for the names that come from other modeling files."""
    imported = {}
    for node in top_level(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module.split(".")[: -node.level]
            origin = ".".join([*package, *([node.module] if node.module else [])])
            imported.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
    return imported
