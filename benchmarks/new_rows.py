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
from images import add_data_options, complete, count, draw, read_data, read_network, untrained
from numpy.random import RandomState
from tables import header, line

from skood.model_selection import surrogates

DEGREES = (0, 5, 10, 15, 20)
SCORES = ("energy", "two_views")
FIT_ROWS = 3000
"""Training rows to which the scores are fitted; others are turned."""


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
    others = draw(len(data.x_train), FIT_ROWS + options.rows, seed=0)[FIT_ROWS:]
    testing = draw(len(data.x_test), 2 * options.rows, seed=0)
    x_test, x_others = data.x_test[testing], data.x_train[others]
    turned = []
    for degrees in DEGREES:
        with patch.object(surrogates, "TURN", degrees):
            turned.append(surrogates.as_new(x_others, RandomState(0)))
    columns = ["test", *(f"turned by {degrees}" for degrees in DEGREES)]
    print(f"{command_line('benchmarks/new_rows.py', argv)}\n")
    print("\n".join(header("percent", *columns)), flush=True)
    detectors = {
        score: untrained(module, options, data, FIT_ROWS, score_function=score) for score in SCORES
    }
    labelled = [(x_test, data.y_test[testing]), *((x, data.y_train[others]) for x in turned)]
    classify = detectors[SCORES[0]].predict_class
    print(line("accuracy", *(100 * np.mean(classify(x) == y) for x, y in labelled)), flush=True)
    for score, detector in detectors.items():
        of_test = detector.score_samples(x_test)
        thresholds = [np.quantile(detector.score_samples(x), 0.05) for x in turned]
        kept = [100 * np.mean(of_test >= threshold) for threshold in thresholds]
        print(line(f"test images kept by {score}", "", *kept), flush=True)


if __name__ == "__main__":
    main()
