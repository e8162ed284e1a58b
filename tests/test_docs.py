"""The documentation names every public name, and its code runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import skood
import skood.plotting
import skood.scores

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from api_page import PUBLIC_MODULES, section  # noqa: E402

# The estimator's own; users import nothing from these. Any other module is public.
INTERNAL_MODULES = {
    "accuracy",
    "agreement",
    "caching",
    "fingerprints",
    "detector",
    "engine",
    "evidence",
    "exporting",
    "exchangeability",
    "fitting",
    "judging",
    "labels",
    "notices",
    "parameters",
    "parts",
    "passes",
    "path",
    "randomness",
    "rejection",
    "rows",
    "saving",
    "scoring",
    "storage",
    "validation",
    "versions",
}

LONGEST_STRING = 200
"""Of a script that makes a page: longer ones are text, which belongs in an rst file."""

GUIDES = sorted([*(ROOT / "docs").glob("*.rst"), *(ROOT / "docs" / "recipes").glob("*.rst")])
PAGES_WITH_EXAMPLES = [path for path in GUIDES if ">>> " in path.read_text("utf-8")]

NOT_OF_THE_TESTS = {"pyod", "transformers"}
"""What recipes are about, and too large to install for each run of the tests."""


def public_names(module: str) -> set[str]:
    return set(importlib.import_module(module).__all__)


def test_every_public_module_is_documented():
    modules = {module.name for module in pkgutil.iter_modules(skood.__path__)}
    assert set(PUBLIC_MODULES) == {"skood", *(f"skood.{m}" for m in modules - INTERNAL_MODULES)}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_the_reference_lists_every_public_name(module):
    table = section(module).partition(":toctree: generated")[2]
    assert set(table.split()) == public_names(module)
    assert public_names(module)


def test_what_a_public_module_defines_in_public_is_in_its_all():
    for module in PUBLIC_MODULES[1:]:
        namespace = vars(importlib.import_module(module))
        defined = {
            name
            for name, value in namespace.items()
            if (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module
            and not name.startswith("_")
        }
        assert defined <= public_names(module), module


def test_every_score_and_display_is_public():
    scores = {kind.__name__ for kind in skood.scores.SCORES.values()}
    assert scores <= public_names("skood.scores")
    folder = skood.plotting.__path__
    modules = {part.name for part in pkgutil.iter_modules(folder)} - {"shared"}
    displays = {
        name
        for module in modules
        for name, value in vars(importlib.import_module(f"skood.plotting.{module}")).items()
        if inspect.isclass(value) and value.__module__ == f"skood.plotting.{module}"
        if name.endswith("Display")
    }
    assert displays == public_names("skood.plotting")


def documented_constants(module: str) -> set[str]:
    """Names assigned in a module, or a part of it, and followed by a string that describes them."""
    parts = [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]
    sources = [inspect.getsource(sys.modules[name]) for name in parts]
    statements = [statement for source in sources for statement in ast.parse(source).body]
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


def code_blocks(page: Path) -> list[str]:
    """The Python blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_readme_code_runs():
    blocks = code_blocks(ROOT / "README.md")
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_no_example_filters_a_warning():
    texts = {path.name: path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert texts
    texts["README.md"] = "\n".join(code_blocks(ROOT / "README.md"))
    filters = re.compile("simplefilter|filterwarnings|catch_warnings")
    assert not [name for name, text in texts.items() if filters.search(text)]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.py")), ids=lambda path: path.name)
def test_the_text_of_the_pages_is_not_in_python(path):
    constants = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if type(n) is ast.Constant]
    strings = [node.value for node in constants if isinstance(node.value, str)]
    assert not [text for text in strings if len(text) > LONGEST_STRING]


def test_no_code_is_within_bold_text():
    """Sphinx would show its backticks, and says nothing."""
    bold = re.compile(r"(?<!\S)\*\*(\S(?:(?!\n\n).)*?)\*\*", re.DOTALL)  # within a paragraph
    for path in [*GUIDES, *(ROOT / "docs" / "_templates").glob("*.rst")]:
        assert not [text for text in bold.findall(path.read_text("utf-8")) if "``" in text]


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_of_the_guides_run(page):
    imports = re.findall(r">>> (?:import|from) (\w+)", page.read_text("utf-8"))
    for library in NOT_OF_THE_TESTS & set(imports):
        pytest.importorskip(library)
    result = doctest.testfile(
        str(page),
        module_relative=False,
        encoding="utf-8",
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted
    assert not result.failed


def test_the_numbers_of_the_first_page_are_those_of_the_readme():
    table = re.findall(r"- \**(\d+\.\d)\b", (ROOT / "docs" / "index.rst").read_text("utf-8"))
    assert len(table) == 16
    assert set(table) <= {*re.findall(r"\d+\.\d", (ROOT / "README.md").read_text("utf-8"))}


def test_changelog_begins_with_this_version():
    versions = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert versions[0] == skood.__version__
