"""The documentation names every public name, and its code runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from itertools import pairwise
from pathlib import Path

import pytest

import skood

ROOT = Path(__file__).parents[1]
# The estimator's own; users import nothing from these. Any other module is public.
INTERNAL_MODULES = {"accuracy", "caching", "detector", "engine", "labels", "randomness"}
SUBMODULES = {module.name for module in pkgutil.iter_modules(skood.__path__)}
PUBLIC_MODULES = ["skood", *(f"skood.{name}" for name in sorted(SUBMODULES - INTERNAL_MODULES))]


def public_names(module: str) -> set[str]:
    return set(importlib.import_module(module).__all__) - {"__version__"} - SUBMODULES


def documented_names() -> dict[str, set[str]]:
    """Entries of the autosummary tables, by the module current at each."""
    page = (ROOT / "docs" / "api" / "index.rst").read_text(encoding="utf-8")
    names: dict[str, set[str]] = {}
    for section in page.split(".. currentmodule:: ")[1:]:
        module, _, rest = section.partition("\n")
        table = re.search(r"\.\. autosummary::\n(?: +:.*\n)*\n((?: +\w+\n)+)", rest)
        names[module] = set(table.group(1).split()) if table else set()
    return names


def test_api_page_lists_the_public_names_and_no_others():
    assert documented_names() == {module: public_names(module) for module in PUBLIC_MODULES}


def documented_constants(module: str) -> set[str]:
    """Names assigned in a module and followed by a string that describes them."""
    statements = ast.parse(inspect.getsource(importlib.import_module(module))).body
    return {
        ast.unparse(statement.targets[0] if isinstance(statement, ast.Assign) else statement.target)
        for statement, following in pairwise(statements)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_have_docstrings(module):
    assert importlib.import_module(module).__doc__
    undocumented = set()
    for name in public_names(module) - documented_constants(module):
        value = getattr(importlib.import_module(module), name)
        if not (inspect.isclass(value) or inspect.isroutine(value)) or not value.__doc__:
            undocumented.add(name)
    assert not undocumented


def test_readme_code_runs():
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_user_guide_examples_run():
    result = doctest.testfile(
        str(ROOT / "docs" / "user_guide.rst"),
        module_relative=False,
        encoding="utf-8",
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted
    assert not result.failed


def test_changelog_begins_with_this_version():
    versions = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert versions[0] == skood.__version__
