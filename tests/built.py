"""Runs the README with the skood that is installed, from a folder where there is no other."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Refuse the tree and its files, then run what the README shows."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.M)
    assert blocks, "the README shows no code"
    os.chdir(tempfile.mkdtemp())
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != README.parent / "tests"]
    import skood

    package = Path(skood.__file__).parent
    assert README.parent / "skood" != package, f"{package} is the tree"
    assert (package / "py.typed").exists(), "py.typed is not in the built file"
    warnings.simplefilter("error", category=DeprecationWarning)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    skood.show_versions()


if __name__ == "__main__":
    main()
