from __future__ import annotations

import math

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from skood.labels import as_labels, cluster_labels, encode_labels, is_outlier, labels_named

# One label a row


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ((2, 0, 1), [2, 0, 1]),
        (np.array([5, -3, 5], dtype=np.int8), [5, -3, 5]),
        (np.array([5, 3, 5], dtype=np.uint16), [5, 3, 5]),
        ([True, False, True], [True, False, True]),
        (["b", "a", "b"], ["b", "a", "b"]),
        (np.array(["b", "a", "b"], dtype=object), ["b", "a", "b"]),
        (np.array([3, 1, 3], dtype=object), [3, 1, 3]),
        (np.array([True, False, True], dtype=object), [True, False, True]),
        (np.array([2.0, 1, 2.0], dtype=object), [2, 1, 2]),
        ([1.0, 0.0, -7.0], [1, 0, -7]),
        (np.array([1, 0, 7], dtype=np.float16), [1, 0, 7]),
        ([[1], [0], [2]], [1, 0, 2]),
        (pd.Series([4, 2, 4], index=[9, 8, 7]), [4, 2, 4]),
        (pd.Series(["b", "a", "b"]), ["b", "a", "b"]),
        (pd.Series(["b", "a", "b"], dtype="category"), ["b", "a", "b"]),
        (pd.Series([4, 2, 4], dtype="Int64"), [4, 2, 4]),
        (pd.DataFrame({"y": [4, 2, 4]}), [4, 2, 4]),
        (pl.Series([4, 2, 4]), [4, 2, 4]),
        (pl.Series(["b", "a", "b"]), ["b", "a", "b"]),
        (pl.Series([True, False, True]), [True, False, True]),
        (torch.tensor([4, 2, 4]), [4, 2, 4]),
        (torch.tensor([[4.0], [2.0], [4.0]], requires_grad=True), [4, 2, 4]),
        (torch.tensor([True, False, True]), [True, False, True]),
    ],
)
def test_labels_of_any_kind_and_container_become_a_plain_array(y, expected):
    labels = as_labels(y, 3)
    assert labels.tolist() == expected
    assert [type(label) for label in labels.tolist()] == [type(label) for label in expected]
    assert labels.dtype.kind in "iubU"


@pytest.mark.parametrize(
    "y", [np.eye(3), np.eye(3, dtype=int), torch.eye(3), pd.DataFrame(np.eye(3)), np.ones((3, 2))]
)
def test_one_hot_rows_are_refused_with_what_to_do(y):
    with pytest.raises(ValueError, match=r"y has shape \(3, [23]\).*y\.argmax\(axis=1\)"):
        as_labels(y, 3)


@pytest.mark.parametrize("y", [np.zeros((3, 1, 1)), 3])
def test_other_shapes_are_refused(y):
    with pytest.raises(ValueError, match=r"shape|dim"):
        as_labels(y, 3)


@pytest.mark.parametrize("n_labels", [2, 4])
def test_another_number_of_labels_is_refused(n_labels):
    with pytest.raises(ValueError, match=rf"y has {n_labels} labels for 3 rows of X"):
        as_labels(np.zeros(n_labels, dtype=int), 3)


@pytest.mark.parametrize(
    "y",
    [
        [0.0, math.nan, 1.0],
        [0.0, math.inf, 1.0],
        np.array([0, math.nan, 1], dtype=object),
        pd.Series([0, None, 1]),
        pd.Series([0, None, 1], dtype="Int64"),
        pl.Series([0, None, 1]),
        torch.tensor([0.0, math.nan, 1.0]),
    ],
)
def test_missing_numbers_are_refused(y):
    with pytest.raises(ValueError, match="y contains NaN or infinity; remove the rows without"):
        as_labels(y, 3)


@pytest.mark.parametrize(
    "y",
    [
        ["a", None, "b"],
        [0, None, 1],
        [None, None, None],
        np.array(["a", math.nan, "b"], dtype=object),
        np.array(["a", 1, "b"], dtype=object),
        pd.Series(["a", None, "b"]),
        pl.Series(["a", None, "b"]),
        pl.Series([True, None, False]),
        # numpy alone would turn these into strings.
        ["a", math.nan, "b"],
        ["a", 1, "b"],
        ["a", True, "b"],
    ],
)
def test_mixed_and_missing_labels_are_refused_with_their_types(y):
    with pytest.raises(ValueError, match=r"y mixes labels of the types \[.*without missing values"):
        as_labels(y, 3)


@pytest.mark.parametrize("y", [[0, 0.5, 1], np.array([0, 1, 1.25]), [0.0, 1.0, 1e300]])
def test_fractional_and_huge_labels_are_refused_as_continuous(y):
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        as_labels(y, 3)


def test_whole_floats_are_labels_up_to_where_float64_skips_integers():
    largest = 2**53 - 1
    assert as_labels([200.0, float(largest)], 2).tolist() == [200, largest]
    for y in ([0.0, 2.0**53], [0.0, 2.0**53 + 2]):
        with pytest.raises(ValueError, match=r"huge values such as 9\.0072e\+15"):
            as_labels(y, 2)


def test_labels_behind_a_mask_and_complex_ones_are_refused():
    with pytest.raises(ValueError, match=r"^y is a masked array"):
        as_labels(np.ma.masked_equal([0, 1], 1), 2)
    with pytest.raises(ValueError, match=r"^Complex data not supported: y has dtype"):
        as_labels([0j, 1j], 2)


def test_labels_have_the_name_that_users_know():
    np.testing.assert_array_equal(labels_named(["a", "b"], "y_true", 2), ["a", "b"])
    with pytest.raises(ValueError, match=r"^y_true does not hold labels: y has 2 labels"):
        labels_named([0, 1], "y_true", 3)


def test_labels_of_several_types_are_refused_with_their_names():
    with pytest.raises(ValueError, match=r"of the types \['NoneType', 'str'\];"):
        as_labels(["a", None], 2)


def test_the_outlier_label_is_of_the_kind_of_the_labels():
    for labels, ood_label in (([0, 1], True), ([True, False], 1), (["a", "b"], 1), ([0, 1], "1")):
        with pytest.raises(ValueError, match="so no row can carry it"):
            is_outlier(np.array(labels), ood_label)


def test_labels_that_are_neither_numbers_nor_strings_are_refused():
    y = np.array(["2020-01-01"] * 3, dtype="datetime64[D]")
    with pytest.raises(ValueError, match=r"y has dtype .*labels are integers, strings or booleans"):
        as_labels(y, 3)


# Known outliers


@pytest.mark.parametrize(
    ("labels", "ood_label", "expected"),
    [
        ([0, 1, -1], -1, [False, False, True]),
        ([0, 1, -1], 5, [False, False, False]),
        (["a", "ood", "b"], "ood", [False, True, False]),
        ([True, False, True], True, [True, False, True]),
        ([0, 1, -1], None, [False, False, False]),
    ],
)
def test_outliers_carry_their_label(labels, ood_label, expected):
    outliers = is_outlier(np.array(labels), ood_label)
    assert outliers.dtype == bool
    assert outliers.tolist() == expected


def test_unsigned_labels_may_carry_an_outlier_label():
    assert is_outlier(np.array([0, 255], dtype=np.uint8), 255).tolist() == [False, True]


@pytest.mark.parametrize(("labels", "ood_label"), [([0, 1], "ood"), (["a", "b"], -1)])
def test_an_outlier_label_of_another_kind_is_refused(labels, ood_label):
    with pytest.raises(ValueError, match=f"ood_label={ood_label!r} is a .* while y has dtype"):
        is_outlier(np.array(labels), ood_label)


# Labels and logits


@pytest.mark.parametrize(
    ("labels", "n_logits", "classes", "indices"),
    [
        # Integers within 0..K-1 are logit indices, whichever occur.
        ([0, 1, 2], 3, [0, 1, 2], [0, 1, 2]),
        ([2, 0, 2], 3, [0, 1, 2], [2, 0, 2]),
        ([1, 3], 5, [0, 1, 2, 3, 4], [1, 3]),
        ([1, 2], 3, [0, 1, 2], [1, 2]),
        # Others are matched in sorted order.
        ([1, 2, 3], 3, [1, 2, 3], [0, 1, 2]),
        ([70, -1, 5, 70], 3, [-1, 5, 70], [2, 0, 1, 2]),
        ([1, -1], 2, [-1, 1], [1, 0]),
        (["dog", "cat", "cow", "cat"], 3, ["cat", "cow", "dog"], [2, 0, 1, 0]),
        (["10", "9"], 2, ["10", "9"], [0, 1]),
        # Booleans are logits 0 and 1, whichever occur.
        ([True, False], 2, [False, True], [1, 0]),
        ([True, True], 2, [False, True], [1, 1]),
    ],
)
def test_labels_are_logit_indices_or_matched_in_sorted_order(labels, n_logits, classes, indices):
    found_classes, found_indices = encode_labels(np.array(labels), n_logits)
    assert found_classes.tolist() == classes
    assert found_indices.tolist() == indices
    assert found_indices.dtype == np.int64
    assert found_classes[found_indices].tolist() == labels


def test_unsigned_labels_are_logit_indices():
    classes, indices = encode_labels(np.array([2, 0], dtype=np.uint8), 3)
    assert classes.tolist() == [0, 1, 2]
    assert indices.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "n_logits", "shown"),
    [
        ([0, 1, 3], 2, r"3 distinct labels: \[0, 1, 3\]"),
        ([1, 2, 3], 2, r"3 distinct labels: \[1, 2, 3\]"),
        ([1, 3], 3, r"2 distinct labels: \[1, 3\]"),
        ([-1, 0, 1], 4, r"3 distinct labels: \[-1, 0, 1\]"),
        (["a", "b"], 3, r"2 distinct labels: \['a', 'b'\]"),
        (["a", "b", "c"], 2, r"3 distinct labels: \['a', 'b', 'c'\]"),
        ([True, False], 3, r"2 distinct labels: \[False, True\]"),
        (list(range(100, 120)), 3, r"20 distinct labels: \[100, .*109,\.\.\."),
    ],
)
def test_other_labels_are_refused_with_the_logits_and_the_labels(labels, n_logits, shown):
    message = f"gives {n_logits} logits, but y holds {shown}.*0..{n_logits - 1}.*ood_label="
    with pytest.raises(ValueError, match=message):
        encode_labels(np.array(labels), n_logits)


# Clusters


def blobs(n_rows, seed=0):
    """Three far blobs; the second column has another scale."""
    truth = np.arange(n_rows) % 3
    rows = np.random.RandomState(seed).randn(n_rows, 2) * [0.01, 1.0]
    return rows + np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 100.0]])[truth], truth


def partition(labels):
    return {tuple(np.flatnonzero(labels == label)) for label in np.unique(labels)}


def test_clusters_are_the_blobs_on_whatever_scale():
    rows, truth = blobs(60)
    labels = cluster_labels(lambda picks: rows[picks], 60, random_state=0)
    assert labels.dtype == np.int64
    assert partition(labels) == partition(truth)


def test_clusters_are_decided_by_the_seed_alone(generator_states):
    rows = np.random.RandomState(0).randn(200, 3)
    before = generator_states()
    first, second, other = (
        cluster_labels(lambda picks: rows[picks], 200, random_state=seed) for seed in (0, 0, 1)
    )
    assert generator_states() == before
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert set(first) == set(range(8))


def test_rows_are_read_in_pieces():
    rows, truth = blobs(25_000)
    sizes = []

    def read(picks):
        sizes.append(len(picks))
        return rows[picks]

    labels = cluster_labels(read, 25_000, random_state=0)
    assert max(sizes) <= 10_000
    for label in np.unique(labels):
        assert len(np.unique(truth[labels == label])) == 1


def test_few_distinct_rows_give_as_many_clusters():
    rows = np.repeat([[0.0, 1.0], [5.0, 2.0]], 40, axis=0)
    labels = cluster_labels(lambda picks: rows[picks], 80, random_state=0)
    assert partition(labels) == {tuple(range(40)), tuple(range(40, 80))}


@pytest.mark.parametrize(("n_rows", "expected"), [(20, 2), (59, 2), (60, 3), (400, 8)])
def test_there_is_a_cluster_for_each_twenty_rows_from_two_to_eight(n_rows, expected):
    rows = np.random.RandomState(0).randn(n_rows, 3)
    labels = cluster_labels(lambda picks: rows[picks], n_rows, random_state=0)
    assert len(np.unique(labels)) == expected


def test_rows_all_alike_are_refused():
    with pytest.raises(ValueError, match=r"The 30 rows of X are all alike \(n_samples = 30\)"):
        cluster_labels(lambda picks: np.ones((len(picks), 2)), 30, random_state=0)
