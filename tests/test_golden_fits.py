"""Fits give what they gave: a formula, an order of draws or a default that changes shows here."""

from __future__ import annotations

import json

import golden_fits
import pytest

KEPT = json.loads(golden_fits.VALUES.read_text(encoding="utf-8"))

# Two threads move values by 2e-6 at most, another instruction set by 6e-7.
TOLERANCE = {"rel": 2e-5, "abs": 1e-6}


def assert_alike(now, kept):
    if isinstance(kept, dict):
        assert now.keys() == kept.keys()
        for name in kept:
            assert_alike(now[name], kept[name])
    elif isinstance(kept, list) and kept and isinstance(kept[0], dict):
        assert len(now) == len(kept)
        for one, other in zip(now, kept, strict=True):
            assert_alike(one, other)
    elif isinstance(kept, list) and kept and isinstance(kept[0], str):
        assert now == kept
    else:
        assert now == pytest.approx(kept, **TOLERANCE)


@pytest.mark.parametrize("name", golden_fits.FITS)
def test_fit_gives_what_it_gave(name):
    assert_alike(golden_fits.FITS[name](), KEPT[name])


def test_two_ranks_give_what_one_gives(group):
    for got in group(golden_fits.share_of_two):
        assert_alike(got, KEPT["two ranks"])


def test_values_are_those_of_the_fits():
    assert KEPT.keys() == golden_fits.FITS.keys()
