"""The reference page, written from the public names themselves: a new one needs no line here."""

from __future__ import annotations

import importlib
from pathlib import Path

# In the order of the page. What else lies in the package is the estimator's own.
PUBLIC_MODULES = [
    "skood",
    "skood.penalties",
    "skood.scores",
    "skood.calibration",
    "skood.metrics",
    "skood.model_selection",
    "skood.monitoring",
    "skood.reporting",
    "skood.networks",
    "skood.datasets",
    "skood.plotting",
    "skood.exceptions",
]


def section(name: str) -> str:
    """A module's part of the page: its docstring and a table of its public names."""
    module = importlib.import_module(name)
    lines = [name, "-" * len(name), ""]
    if name != "skood":
        lines += [f".. automodule:: {name}", "   :no-members:", ""]
    lines += [f".. currentmodule:: {name}", "", ".. autosummary::", "   :toctree: generated", ""]
    lines += [f"   {public}" for public in sorted(module.__all__)]
    return "\n".join([*lines, ""])


def write(folder: Path) -> None:
    """Write the page into a folder."""
    title = "API reference"
    sections = [section(name) for name in PUBLIC_MODULES]
    page = "\n".join([title, "=" * len(title), "", *sections])
    folder.mkdir(exist_ok=True)
    (folder / "index.rst").write_text(page, encoding="utf-8")
