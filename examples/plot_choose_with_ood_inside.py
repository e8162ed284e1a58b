"""
Choosing the weight with outliers among the rows
================================================

Rows of known classes and rows that belong to none of them lie in one array; the label "other" marks
the latter. They must never be trained on, neither in the folds nor in the fit that follows, and yet
every fold is to be tested on some of them. The rows come class by class, as they often do, which is
where plain folds go wrong.

This is how it is done, not proof that the weight matters: on digits its effect is lost in the
differences between folds and seeds. ``benchmarks/README.md`` has results on real images.
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
# ``ood_label`` says three times which rows are no known digits: to the detector, whose ``fit``
# leaves them out; to the folds, which train on none of them and test each once; and to the scorer,
# which tells them from the others.
#
# There is no classifier here, so the detector builds a small one and trains it in every fold. With
# ``memory`` the candidates share that training.

with tempfile.TemporaryDirectory() as folder:
    search = GridSearchCV(
        SparseEnergyOODDetector(ood_label="other", memory=folder, random_state=0),
        {"sparsity_weight": [0.0, 0.1, 0.3, 1.0]},
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
# Means over the folds with their standard deviations. The grey region is what the guard allows.

SelectionDisplay.from_estimator(search)
plt.show()
