"""
Choosing the weight without outliers
====================================

If you have no outliers, the scorer makes some from the rows held out in each fold: images with
permuted patches, less detail or less contrast, and simple shapes such as strokes. You will not meet
such surrogates in practice. Use them to rank the weights; the scores themselves mean little.

This shows how to do it. On digits, folds and seeds matter more than weights, so nothing here shows
that surrogates rank weights correctly. ``benchmarks/README.md`` measures that on real images.
"""

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
# For images it makes these eight kinds in equal shares. For a table it permutes each column
# separately.

kinds = ["patches", "blur", "contrast", "edges", "strokes", "silhouettes", "shapes", "glyphs"]
made = {"digits": X[:8]} | {
    kind: surrogate_outliers(X, kind=kind, random_state=0)[:8] for kind in kinds
}
figure, axes = plt.subplots(9, 8, figsize=(6.4, 7.6), layout="constrained")
for row, (kind, pictures) in zip(axes, made.items(), strict=True):
    row[0].set_ylabel(kind)
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])

# %%
# The search
# ----------
# The classifier is trained on one half of the digits, and the search uses the other half.

torch.manual_seed(0)
classifier = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
inputs, targets = torch.as_tensor(X_train, dtype=torch.float32), torch.as_tensor(y_train)
for _ in range(20):
    for index in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(classifier(inputs[index]), targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

metrics = ["auroc", "accuracy_change", "mean_l1"]
search = GridSearchCV(
    SparseEnergyOODDetector(classifier, random_state=0),
    {"sparsity_weight": [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]},
    cv=InDistributionKFold(3, random_state=0),
    scoring=make_ood_scorer(metrics),
    refit=AccuracyGuard("auroc", tolerance=0.01),
).fit(X, y)
print("chosen on surrogates:", search.best_params_)

# %%
# Compared with real outliers
# ---------------------------
# Here we do have outliers, the digits 8 and 9, so we can compare. The left column shows the search
# with surrogates, the right column the same search with these digits. The heights differ, but good
# surrogates would agree on which weights are better. The bars show whether either search can tell.

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
