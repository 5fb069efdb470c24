"""Reading methods back from their source, in whatever Python runs this."""

import argparse
import fractions
import inspect
import json.decoder
import logging
import textwrap
import unittest.mock

import pytest

from hf_swiglu.patching.source import NoSource, method_tree, rebuild

MODULES = [argparse, fractions, inspect, json.decoder, logging, textwrap, unittest.mock]


class Named:
    scale = 2

    def __init__(self):
        super(Named, self).__init__()  # noqa: UP008
        self.__scale = Named.scale

    def scaled(self, numbers):
        return [number * self.__scale for number in numbers if number in {"a", "b", 1, 2}]

    def shifted(self, text):
        return textwrap.dedent(text) + textwrap.indent(text, " " * Named.width())

    @staticmethod
    def width():
        return len(Named.__name__)


def functions_of(module):
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            for value in vars(cls).values():
                # Named tuples and data classes have methods of no file.
                if inspect.isfunction(value) and value.__code__.co_filename == module.__file__:
                    yield value


@pytest.mark.parametrize("name", ["__init__", "scaled", "shifted"])
def test_a_method_that_names_its_class_or_has_a_comprehension(name):
    function = vars(Named)[name]
    again = rebuild(method_tree(function), function, {})
    assert again is not function and again.__globals__ is function.__globals__
    instance = Named()
    arguments = {"__init__": (), "scaled": ([1, 3],), "shifted": ("  x",)}[name]
    assert again(instance, *arguments) == function(instance, *arguments)


def test_nearly_every_method_of_the_standard_library_is_read():
    """But for coroutines, and for what other lines of a module change: `super` at its top, for instance."""
    functions = [function for module in MODULES for function in functions_of(module)]
    unread = []
    for function in functions:
        try:
            rebuild(method_tree(function), function, {})
        except NoSource:
            unread.append(function.__qualname__)
    assert len(functions) > 400
    assert len(unread) < len(functions) * 0.03, unread
