"""First alarms of nonconform on streams of scores; run by `monitoring.py`, in Python 3.12."""

from __future__ import annotations

import sys

import numpy as np
from nonconform.martingales import AlarmConfig, SimpleJumperMartingale
from nonconform.monitoring import SequentialRankConformalizer


def main(given: str, found: str) -> None:
    """Read the streams, write the rows of the alarms; -1 is none."""
    with np.load(given) as arrays:
        calibration, streams, level = arrays["calibration"], arrays["streams"], arrays["level"]
    alarm = AlarmConfig(restarted_ville_threshold=1 / float(level))
    first = []
    for seed, (before, stream) in enumerate(zip(calibration, streams, strict=True)):
        ranks = SequentialRankConformalizer(tail="lower", seed=seed).prime_many(before)
        martingale = SimpleJumperMartingale(alarm_config=alarm)
        first.append(-1)
        for row, score in enumerate(stream):
            if martingale.update(ranks.update(score)).triggered_alarms:
                first[-1] = row
                break
    np.save(found, np.array(first))


if __name__ == "__main__":
    main(*sys.argv[1:])
