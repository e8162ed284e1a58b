"""The panel: which kind of outliers each OOD set holds, and the sets that need no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

STAND_INS = {"tinyimagenet_crop": "LSUN-C", "tinyimagenet_resize": "LSUN-R", "intel_scenes": "iSUN"}
"""OOD sets that take the place of those in the paper."""

SIX = ("svhn", "textures", "places", "lsun_c", "lsun_r", "isun", *STAND_INS)
"""The paper's six sets, by the names of their files, and what stands in for them."""

NOISE = ("uniform_pixels", "flat_colours")
"""OOD sets that are made here."""

KINDS = {
    "objects-near": ("cifar10", "cifar100", "tinyimagenet_crop", "tinyimagenet_resize"),
    "scenes": ("places", "intel_scenes", "lsun_c", "lsun_r", "isun"),
    "textures": ("textures",),
    "digits-glyphs": ("svhn", "mnist"),
    "faces-garments": ("faces", "fashionmnist"),
    "noise": NOISE,
}
"""OOD sets by kind, as their files are named. Another set is a kind of its own, or of the kind that
it is named after."""

N_NOISE = 1000

SUMMARIES = ("mean", "mean_apart", "mean_kinds", "worst_change", "worst_change_same_score")
"""Results over several OOD sets, which are filed as if of one."""


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """The sets of each kind, in the order of `KINDS`, then those that are their own."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return {kind: members for kind, members in kinds.items() if members}


def means_by_kind(values: Mapping[str, float]) -> dict[str, float]:
    """Of one value a set, the mean over the sets of each kind."""
    return {
        kind: float(np.mean([values[name] for name in names]))
        for kind, names in by_kind(values).items()
    }


def kind_of(name: str) -> str:
    return next((kind for kind, members in KINDS.items() if name in members), name)


def kind_row(kind: str) -> str:
    """Under what results of a kind are filed; no set can be called so."""
    return f"kind:{kind}"


def of_the_six(names: Iterable[str]) -> list[str]:
    """The sets of the paper's mean; if there are none, all that came from files."""
    given = [name for name in names if name not in NOISE]
    return [name for name in given if name in SIX] or given


def noise_sets(shape: tuple[int, ...]) -> dict[str, NDArray[np.uint8]]:
    """Independent uniform pixels, and images of one random colour each."""
    random = np.random.RandomState(0)
    pixels = random.randint(256, size=(N_NOISE, *shape), dtype=np.uint8)
    colours = random.randint(256, size=(N_NOISE, 1, 1, shape[-1]), dtype=np.uint8)
    images = (pixels, np.broadcast_to(colours, pixels.shape).copy())
    return dict(zip(NOISE, images, strict=True))
