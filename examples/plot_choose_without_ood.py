"""
Choosing the weight without outliers
====================================

Where there are no outliers at hand, the scorer makes some from the rows held out in each fold:
images with their patches permuted, blurred ones, and ones with a fifth of their contrast.
Such surrogates are no outliers that anybody will meet. They serve to
rank the weights, and the scores themselves mean little.

This is how it is done. On digits the effect of the weight is lost in the differences between folds
and seeds, so nothing here shows that surrogates rank weights rightly; ``benchmarks/README.md``
measures that on real images.
"""

import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.model_selection import (
    AccuracyGuard,
    InDistributionKFold,
    make_ood_scorer,
    surrogate_outliers,
)
from skood.plotting import SelectionDisplay

digits = load_digits()
images, digit = digits.images / 16, digits.target
known = digit < 8
X_train, X, y_train, y = train_test_split(
    images[known], digit[known], train_size=0.5, stratify=digit[known], random_state=0
)

# %%
# What the scorer makes
# ---------------------
# From images it takes these three kinds in turn, from a table columns that are permuted each on its
# own.

kinds = ["patches", "blur", "contrast"]
made = {"digits": X[:8]} | {
    kind: surrogate_outliers(X, kind=kind, random_state=0)[:8] for kind in kinds
}
figure, axes = plt.subplots(4, 8, figsize=(6.4, 3.6), layout="constrained")
for row, (kind, pictures) in zip(axes, made.items(), strict=True):
    row[0].set_ylabel(kind)
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])

# %%
# The search
# ----------
# The classifier is trained on one half of the digits; the search takes the other. ``fit`` warns of
# classifiers that are right on nearly all rows, as they might have seen them before; here we know.

torch.manual_seed(0)
classifier = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
inputs, targets = torch.as_tensor(X_train, dtype=torch.float32), torch.as_tensor(y_train)
for _ in range(20):
    for rows in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(classifier(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

warnings.filterwarnings("ignore", message="The module given classifies")
metrics = ["neg_fpr_at_tpr", "accuracy_change", "mean_l1"]
search = GridSearchCV(
    SparseEnergyOODDetector(classifier, random_state=0),
    {"sparsity_weight": [0.0, 0.02, 0.05, 0.1, 0.2, 0.5]},
    cv=InDistributionKFold(3, random_state=0),
    scoring=make_ood_scorer(metrics),
    refit=AccuracyGuard("neg_fpr_at_tpr", tolerance=0.01),
).fit(X, y)
print("chosen on surrogates:", search.best_params_)

# %%
# Beside real outliers
# --------------------
# Here we do have outliers, the digits 8 and 9, and can look at what the surrogates stand for: the
# same search on the left with surrogates, on the right with these digits. The heights differ; a
# good surrogate would agree on which weights are better. Judge by the bars whether either can tell.

real = GridSearchCV(
    search.estimator,
    search.param_grid,
    cv=search.cv,
    scoring=make_ood_scorer(metrics, X_ood=images[~known]),
    refit=search.refit,
).fit(X, y)
print("chosen on the digits 8 and 9:", real.best_params_)

figure, axes = plt.subplots(3, 2, sharex=True, figsize=(9, 5.5), layout="constrained")
SelectionDisplay.from_estimator(search, ax=axes[:, 0])
SelectionDisplay.from_estimator(real, ax=axes[:, 1])
plt.show()
