"""
Choosing the weight with outliers at hand
=========================================

A classifier knows the digits from 0 to 7. Other images lie in arrays of their own: the digits 8 and
9, and noise. ``GridSearchCV`` chooses the sparsity weight of the detector that tells them best from
the known digits, among the weights that leave the classifier as good as it is.

This is how it is done, not proof that the weight matters: on some seven hundred digits its effect
is small, and what there is of it is lost in the differences between folds and seeds.
``benchmarks/README.md`` has results on real images.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.plotting import SelectionDisplay

images, digit = load_digits(return_X_y=True)
images = images / 16
known = digit < 8
outliers = {
    "8 and 9": images[~known],
    "noise": np.random.default_rng(0).uniform(size=(300, 64)),
}

# %%
# The classifier is trained on one half of the known digits; the other half is for the search. Rows
# that the classifier was trained on would flatter every candidate.

X_train, X, y_train, y = train_test_split(
    images[known], digit[known], train_size=0.5, stratify=digit[known], random_state=0
)

torch.manual_seed(0)
classifier = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
inputs, targets = torch.as_tensor(X_train, dtype=torch.float32), torch.as_tensor(y_train)
for _ in range(20):
    for rows in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(classifier(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
# The search
# ----------
# The scorer takes the outliers, here two named sets: each score is the mean over them, and
# ``<score>_<set>`` that of one. ``AccuracyGuard`` takes the least FPR95 among the weights that cost
# at most one point of accuracy.
#
# ``fit`` warns of a classifier that is right on nearly all rows, as it might have seen them before.
# Here we know.

warnings.filterwarnings("ignore", message="The module given classifies")
search = GridSearchCV(
    SparseEnergyOODDetector(classifier, random_state=0),
    {"sparsity_weight": [0.0, 0.02, 0.05, 0.1, 0.2, 0.5]},
    cv=InDistributionKFold(3, random_state=0),
    scoring=make_ood_scorer(["neg_fpr_at_tpr", "accuracy_change", "mean_l1"], X_ood=outliers),
    refit=AccuracyGuard("neg_fpr_at_tpr", tolerance=0.01),
).fit(X, y)

results = search.cv_results_
print(f"{'weight':>8}{'FPR95':>8}" + "".join(f"{name:>10}" for name in outliers))
for candidate, params in enumerate(results["params"]):
    columns = ["neg_fpr_at_tpr", *(f"neg_fpr_at_tpr_{name}" for name in outliers)]
    values = [-results[f"mean_test_{column}"][candidate] for column in columns]
    print(
        f"{params['sparsity_weight']:8}{values[0]:8.3f}" + "".join(f"{v:10.3f}" for v in values[1:])
    )
print("chosen:", search.best_params_)

# %%
# The picture
# -----------
# Means over the folds with their standard deviations. The grey region is what the guard allows.

SelectionDisplay.from_estimator(search)
plt.show()

# %%
# ``best_estimator_`` is the detector, fitted anew on all rows of the search.

for name, rows in outliers.items():
    print(f"{name}: {np.mean(search.best_estimator_.predict(rows) == -1):.0%} rejected")
