"""
Choosing the weight with outliers among the rows
================================================

One array holds rows of known classes and rows of other classes. The others have the label "other".
They must never be trained on, neither in the folds nor in the fit that follows. But each fold
should be tested on some of them. The rows are ordered by class, as they often are; plain folds fail
there.

This shows how to do it. It does not prove that the weight matters: on digits, folds and seeds
matter more. ``benchmarks/README.md`` has results on real images.
"""

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skood import SparseEnergyOODDetector
from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.plotting import SelectionDisplay

X, digit = load_digits(return_X_y=True)
names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "other", "other"])
order = np.argsort(digit, kind="stable")
X, y = X[order], names[digit[order]]

# %%
# The search
# ----------
# ``ood_label`` is passed three times. The ``fit`` of the detector leaves these rows out. The folds
# train on none of them and test each one once. The scorer measures how well they are detected.
#
# There is no classifier here, so the detector builds a small one and trains it in every fold. With
# ``memory`` the candidates share that training.

with tempfile.TemporaryDirectory() as folder:
    search = GridSearchCV(
        SparseEnergyOODDetector(ood_label="other", memory=folder, random_state=0),
        {"sparsity_weight": [0.0, 1.0, 4.0, 16.0]},
        cv=InDistributionKFold(3, ood_label="other", random_state=0),
        scoring=make_ood_scorer(
            ["neg_fpr_at_tpr", "accuracy_change", "mean_l1"], ood_label="other"
        ),
        refit=AccuracyGuard("neg_fpr_at_tpr", tolerance=0.01),
    ).fit(X, y)

print("chosen:", search.best_params_)
print("classes of the detector:", ", ".join(search.best_estimator_.classes_))

# %%
# The picture
# -----------
# Means over the folds, with their standard deviations. The guard allows the grey region.

SelectionDisplay.from_estimator(search)
plt.show()
