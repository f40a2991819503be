"""Every Python that is promised can evaluate the annotations of every class.

pydantic does so for each schema, and what an annotation may be differs from one Python to another: 3.10 has no plain
``ClassVar``. A fault of one Python shows only when the tests run on it: ``make test-pythons``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing

import pytest

import megachiar

pytestmark = pytest.mark.every_python

MODULES = sorted(module.name for module in pkgutil.walk_packages(megachiar.__path__, "megachiar."))


FOR_TRANSFORMERS = {"megachiar.interop.modeling_chiar", "megachiar.interop.tokenization_chiar"}
"""Modules that are copied to a folder of an export: their classes have bases of transformers."""


@pytest.mark.parametrize("name", MODULES)
def test_annotations_of_classes_can_be_evaluated(name):
    if name in FOR_TRANSFORMERS:
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megachiar[hf]'")
    module = importlib.import_module(name)
    for _, one in inspect.getmembers(module, inspect.isclass):
        if one.__module__ != name:
            continue
        if name in FOR_TRANSFORMERS:  # the library's own annotations are not for us to evaluate
            own = {"__module__": name, "__annotations__": vars(one).get("__annotations__", {})}
            one = type(one.__name__, (), own)
        typing.get_type_hints(one)
