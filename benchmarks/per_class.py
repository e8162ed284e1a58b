"""How many rows of each class are rejected, with one threshold for all and with one for each?

Takes a network as it is, calibrates on half of the test rows, and counts on the other half what is
rejected of each class, the true one. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from environment import command_line
from images import (
    add_data_options,
    complete,
    draw,
    read_data,
    read_network,
    untrained,
)

from skood.scores import list_scores

FIT_ROWS = 2000
"""Training rows for scores that are fitted."""


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate twice, and print what is rejected."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--score", choices=list_scores(), default="energy", help="default: energy")
    options = parser.parse_args(argv)
    complete(options)
    data = read_data(options.id, options.ood)
    fresh, tested = np.array_split(draw(len(data.x_test), None, seed=0), 2)
    module = read_network(options, data.n_classes)
    detector = untrained(module, options, data, FIT_ROWS, score_function=options.score)
    y = data.y_test[tested]
    print(f"{command_line('benchmarks/per_class.py', argv)}\n")
    print("| threshold | rejected, all | by class, least | most | outliers kept |")
    print("|---|---|---|---|---|")
    for per_class in (False, True):
        detector.calibrate(data.x_test[fresh], per_class=per_class)
        rejected = 100 * (detector.predict(data.x_test[tested]) == -1)
        by_class = [rejected[y == one].mean() for one in np.unique(y)]
        kept = [100 * np.mean(detector.predict(x[:1000]) == 1) for x in data.ood.values()]
        name = "one a class" if per_class else "one for all"
        values = (rejected.mean(), min(by_class), max(by_class), float(np.mean(kept)))
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    main()
