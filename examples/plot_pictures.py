"""
Pictures of a detector
======================

Pictures show how good a detector is. :doc:`plot_digits` has the distributions of the scores, and
:doc:`plot_clothes` has images in a grid. Here are the ROC curve with the operating point, the
activity of the features, a table of several detectors, the risk that rejection leaves, and the
share of each class that is kept.

A classifier learns the digits 0 to 7. The outliers are the digits 8 and 9, digits upside down, and
noise. With so few rows you can learn to read the pictures, but not which detector is best.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.plotting import (
    ClassCoverageDisplay,
    DetectionRocDisplay,
    DetectionTableDisplay,
    FeatureActivityDisplay,
    RiskCoverageDisplay,
)

digits = load_digits()
images, digit = digits.images / 16, digits.target
known = digit < 8
X_train, X_rest, y_train, y_rest = train_test_split(
    images[known], digit[known], train_size=0.5, stratify=digit[known], random_state=0
)
X_fresh, X_test, _, y_test = train_test_split(X_rest, y_rest, train_size=0.5, random_state=0)
outliers = {
    "8 and 9": images[~known],
    "upside down": X_test[:, ::-1],
    "noise": np.random.default_rng(0).uniform(size=(300, 8, 8)),
}

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

# %%
# There are three detectors: the classifier as it is, fine-tuned without the penalty, and fine-tuned
# with it. The classifier was trained on the rows that ``fit`` gets, so ``calibrate`` places the
# thresholds on fresh rows.

settings = {
    "untouched": {"sparsity_weight": 0, "max_epochs": 0},
    "weight 0": {"sparsity_weight": 0},
    "weight 0.2": {"sparsity_weight": 0.2, "penalty": "l1"},
}
detectors = {
    name: SparseEnergyOODDetector(classifier, random_state=0, **each)
    .fit(X_train, y_train)
    .calibrate(X_fresh)
    for name, each in settings.items()
}

# %%
# The ROC and the operating point
# -------------------------------
# Each point of a curve is a threshold: the vertical axis has the share of test digits that are
# kept, the horizontal axis the share of outliers. The line is the share of test digits that the
# detector's own threshold keeps; it was placed on fresh digits to keep 95 %. The black markers show
# the share of each set of outliers that it keeps.

DetectionRocDisplay.from_estimator(detectors["weight 0.2"], X_test, outliers)

# %%
# What the penalty does to the features
# -------------------------------------
# The features of each row are sorted from large to small and then averaged over the rows. The area
# below a curve is the mean L1 norm. The sparser the rows, the steeper the curve and the higher the
# Hoyer index.

figure, axes = plt.subplots(2, sharex=True, sharey=True, figsize=(6.4, 7), layout="constrained")
for ax, name in zip(axes, ("weight 0", "weight 0.2"), strict=True):
    FeatureActivityDisplay.from_estimator(detectors[name], X_test, outliers, ax=ax)
    ax.set_title(name)
axes[0].set_xlabel("")

# %%
# The detectors side by side
# --------------------------
# There is one number for each detector and set. The threshold that keeps 95 % is taken from the
# test rows themselves, as in published tables, so all detectors keep the same share. If you have
# several seeds, pass their means to ``DetectionTableDisplay`` itself, and their standard deviations
# as ``spread``.

DetectionTableDisplay.from_estimator(detectors, X_test, outliers, metric="fpr95")

# %%
# What rejection is worth
# -----------------------
# If a classifier may decline to answer, it makes fewer errors on what it answers. The curve shows
# the share of errors (the risk) for each share of rows that are answered (the coverage), the most
# usual rows first. The marker is the detector's own threshold.

RiskCoverageDisplay.from_estimator(detectors, X_test, y_test)

# %%
# Who is rejected
# ---------------
# One threshold for all classes keeps 95 % of all rows, but not of each class.
# ``calibrate(X, per_class=True)`` evens that out.

ClassCoverageDisplay.from_estimator(detectors["weight 0.2"], X_test, y_test)
plt.show()
