"""Do turned training images stand for new ones?

A classifier is surer of the images that it was trained on than of others. So a threshold that keeps
95 % of these keeps fewer of the test images. This takes a network as it is, turns training images
by up to so many degrees first, and counts how many test images the threshold then keeps. Prints a
table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
from environment import command_line
from images import (
    NORMALISATIONS,
    add_data_options,
    complete,
    count,
    draw,
    quietly_fitted,
    read_data,
    read_network,
)
from numpy.random import RandomState
from tables import header, line

from skood import SparseEnergyOODDetector
from skood.model_selection import surrogates

DEGREES = (0, 5, 10, 15, 20)
SCORES = ("energy", "two_views")
FIT_ROWS = 3000
"""Training rows to which the scores are fitted."""


def main(argv: Sequence[str] | None = None) -> None:
    """Turn, place thresholds, and count."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser, ood=False)
    parser.add_argument("--rows", type=count, default=1000, help="that are turned (default: 1000)")
    options = parser.parse_args(argv)
    complete(options)
    data = read_data(options.id, [])
    module = read_network(options, data.n_classes)
    picks = draw(len(data.x_train), FIT_ROWS + options.rows, seed=0)
    fitted, others = picks[:FIT_ROWS], picks[FIT_ROWS:]
    testing = draw(len(data.x_test), 2 * options.rows, seed=0)
    turned = {}
    for degrees in DEGREES:
        with patch.object(surrogates, "TURN", degrees):
            turned[degrees] = surrogates.as_new(data.x_train[others], RandomState(0))
    columns = ["test", *(f"turned by {degrees}" for degrees in DEGREES)]
    print(f"{command_line('benchmarks/new_rows.py', argv)}\n")
    print("\n".join(header("percent", *columns)), flush=True)
    for score in SCORES:
        detector = SparseEnergyOODDetector(
            module,
            max_epochs=0,
            score_function=score,
            preprocess=NORMALISATIONS[options.normalise],
            random_state=0,
        )
        quietly_fitted(detector, data, fitted)
        if score == SCORES[0]:
            right = [
                100 * np.mean(detector.predict_class(x) == y)
                for x, y in [
                    (data.x_test[testing], data.y_test[testing]),
                    *((x, data.y_train[others]) for x in turned.values()),
                ]
            ]
            print(line("accuracy", *right), flush=True)
        of_test = detector.score_samples(data.x_test[testing])
        thresholds = [np.quantile(detector.score_samples(x), 0.05) for x in turned.values()]
        kept = [100 * np.mean(of_test >= threshold) for threshold in thresholds]
        print(line(f"test images kept by {score}", "", *kept), flush=True)


if __name__ == "__main__":
    main()
