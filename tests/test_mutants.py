"""What `make mutants` is told, and the list of mutants that survive, name what there is."""

from __future__ import annotations

import inspect
import pydoc
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutmut"]
SURVIVORS = re.findall(
    r"^- `([\w.]+)`: `(.+?)`; .+\.$", (ROOT / "tests" / "mutants.md").read_text("utf-8"), re.M
)


def test_modules_are_broken_under_the_tests_of_the_same_name():
    modules = CONFIGURATION["only_mutate"]
    tests = CONFIGURATION["pytest_add_cli_args_test_selection"]
    assert tests == [f"tests/test_{Path(module).name}" for module in modules]
    assert all((ROOT / path).is_file() for path in [*modules, *tests])


@pytest.mark.parametrize("module", CONFIGURATION["only_mutate"])
def test_lines_left_alone_are_text_of_messages(module):
    (pattern,) = CONFIGURATION["do_not_mutate_patterns"]
    left_alone = [
        line for line in (ROOT / module).read_text("utf-8").splitlines() if re.match(pattern, line)
    ]
    assert len(left_alone) > 5
    assert not any(re.search(r"return|lambda|==", line) for line in left_alone)


@pytest.mark.parametrize(("name", "code"), SURVIVORS)
def test_survivors_are_still_in_the_code(name, code):
    assert code in inspect.getsource(pydoc.locate(name))


def test_survivors_are_listed_one_a_line():
    lines = (ROOT / "tests" / "mutants.md").read_text("utf-8").splitlines()
    assert len(SURVIVORS) == sum(line.startswith("- ") for line in lines) > 0
