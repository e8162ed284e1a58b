"""The order of the examples in the gallery."""


def demo_first(name: str) -> tuple[bool, str]:
    """The script that `make demo` runs comes first, the others by their names."""
    return name != "plot_clothes.py", name
