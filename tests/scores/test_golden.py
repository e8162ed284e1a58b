"""Golden values of every score, by its name and so with its default parameters.

They come from the equations of the papers in NumPy and SciPy alone, with the defaults written out,
so they also notice a default that changes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import made, relu_features, scores_of

from skood.scores import Odin, list_scores

GOLDEN = {
    "dice": [14.27482591, 15.73398531, 29.19918793],
    "direction_length": [-41.03199791, -61.07936324, -39.8126032],
    "energy": [17.84136808, 13.96492195, 29.94285266],
    "gen": [-20.32647211, -29.98335374, -9.203021005],
    "knn": [-1.082796746, -0.9832205062, -0.970048468],
    "layer_moments": [-9.873960693, -10.11100658, -8.986028594],
    "mahalanobis": [-27.05969129, -44.72027239, -51.22303101],
    "mahalanobis++": [-38.94999471, -62.02488137, -38.91472503],
    "max_logit": [17.38269721, 12.82936732, 29.94046296],
    "msp": [0.6321232571, 0.3212439005, 0.9976131567],
    "odin": [0.009262943594, 0.009215512801, 0.009364132935],
    "react": [13.41490802, 12.42548827, 24.34677102],
    "scale": [70.97270259, 74.57311002, 153.5495253],
    "three_views": [-11.01946231, -15.22517573, -7.419278069],
    "two_views": [-4.899673084, -8.887154553, -3.275764357],
    "vim": [-22.69069778, -7.15511536, -5.309004423],
}
"""Of the first rows to score; higher is more in-distribution."""


@pytest.mark.parametrize("name", list_scores())
def test_scores_have_their_golden_values(name):
    # More classes than the 100 probabilities that "gen" sums, more rows than "knn" has neighbours.
    case = made(*relu_features(n_rows=400, n_classes=110))
    np.testing.assert_allclose(scores_of(name, case)[:3], GOLDEN[name], rtol=1e-6)


def test_the_step_of_odin_has_the_length_of_the_paper():
    rows = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    step = Odin().perturbation(rows, rows)  # the logits are the rows, the first is the winner
    assert step.tolist() == [[0.0014, -0.0014]]
