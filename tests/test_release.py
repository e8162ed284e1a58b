"""What a release is made of says the same everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import skood

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA = {"torch": "pytorch"}
"""Packages that have another name with conda."""


def of_yaml(name):
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_the_version_is_the_same_everywhere():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest, date = re.search(r"^## \[(.*?)\] - (\S+)$", text, re.MULTILINE).groups()
    citation = of_yaml("CITATION.cff")
    assert newest == skood.__version__
    assert (citation["version"], citation["date-released"]) == (newest, date)
    assert of_yaml("conda/recipe.yaml")["context"]["version"] == newest


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    needed = [Requirement(line) for line in PROJECT["dependencies"]]
    expected = {f"{CONDA.get(one.name, one.name)} {one.specifier}" for one in needed}
    run = set(of_yaml("conda/recipe.yaml")["requirements"]["run"])
    assert run == expected | {f"python {PROJECT['requires-python']}"}


def test_the_binder_installs_what_there_is():
    lines = (ROOT / ".binder" / "requirements.txt").read_text("utf-8").splitlines()
    (constraints,) = (line.removeprefix("-c ") for line in lines if line.startswith("-c "))
    assert (ROOT / ".binder" / constraints).exists()
    (extras,) = re.findall(r"^\.\[(.*)\]$", "\n".join(lines), re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "torch" in lines[: lines.index(f".[{extras}]")]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_what_the_workflows_make_is_in_the_makefile(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    called = re.findall(r"\bmake ([\w-]+)", path.read_text("utf-8"))
    assert set(called) <= set(targets)
