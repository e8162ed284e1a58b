"""
Choosing the weight with outliers in arrays of their own
=========================================================

A classifier knows the digits from 0 to 7. The outliers are in arrays of their own: the digits 8 and
9, and noise. ``GridSearchCV`` chooses the sparsity weight that detects them best, among the weights
that leave the classifier as good as it is.

This shows how to do it. It does not prove that the weight matters: on some six hundred digits its
effect is small, and folds and seeds matter more. ``benchmarks/README.md`` has results on real
images.
"""

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
# The classifier is trained on one half of the known digits. The search uses most of the other half,
# because on rows that the classifier was trained on every candidate would look too good. The rest
# of the digits are for the threshold.

X_train, X_rest, y_train, y_rest = train_test_split(
    images[known], digit[known], train_size=0.5, stratify=digit[known], random_state=0
)
X, X_fresh, y, _ = train_test_split(X_rest, y_rest, train_size=0.8, stratify=y_rest, random_state=0)

torch.manual_seed(0)
classifier = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
inputs, targets = torch.as_tensor(X_train, dtype=torch.float32), torch.as_tensor(y_train)
for _ in range(20):
    for index in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(classifier(inputs[index]), targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
# The search
# ----------
# The scorer gets the outliers, here two named sets. Each score is the mean over the sets, and
# ``<score>_<set>`` is the score of one set. ``AccuracyGuard`` chooses the weight with the lowest
# FPR95 among those that cost at most one point of accuracy.

search = GridSearchCV(
    SparseEnergyOODDetector(classifier, random_state=0),
    {"sparsity_weight": [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]},
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
# Means over the folds, with their standard deviations. The guard allows the grey region.

SelectionDisplay.from_estimator(search)
plt.show()

# %%
# The detector
# ------------
# ``best_estimator_`` is the detector with this weight, fitted on all rows of the search.
# ``calibrate`` places its threshold on digits that neither the classifier nor the search has seen.

detector = search.best_estimator_.calibrate(X_fresh)
for name, rows in outliers.items():
    print(f"{name}: {np.mean(detector.predict(rows) == -1):.0%} rejected")
