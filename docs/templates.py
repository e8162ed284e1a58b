"""Pages whose text is written by hand, in `_templates`, and whose tables are not."""

from __future__ import annotations

from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).parent / "_templates"


def write_page(folder: Path, template: str, page: str = "index", **parts: str) -> None:
    """Write a page into a folder: a template with its ``$names`` replaced."""
    text = Template((TEMPLATES / f"{template}.rst").read_text(encoding="utf-8")).substitute(parts)
    folder.mkdir(exist_ok=True)
    (folder / f"{page}.rst").write_text(text, encoding="utf-8")


def heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}"
