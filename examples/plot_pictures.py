"""
Pictures of a detector
======================

Four pictures tell how a detector does. :doc:`plot_digits` shows the first, the distributions of the
scores. Here are the others: the ROC with the operating point, the activity of the features, and a
table of several detectors.

A classifier learns the digits 0 to 7. Outliers are the digits 8 and 9, its own digits upside down,
and noise. So few rows show how to read the pictures, and not which detector is best.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.plotting import DetectionRocDisplay, DetectionTableDisplay, FeatureActivityDisplay

digits = load_digits()
images, digit = digits.images / 16, digits.target
known = digit < 8
X_train, X_rest, y_train, _ = train_test_split(
    images[known], digit[known], train_size=0.5, stratify=digit[known], random_state=0
)
X_fresh, X_test = train_test_split(X_rest, train_size=0.5, random_state=0)
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
    for rows in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(classifier(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
# Three detectors: the classifier as it is, fine-tuned without the penalty, and with it. All were
# trained on the rows that they are fitted with, which ``fit`` warns of; ``calibrate`` places the
# thresholds on fresh ones.

settings = {
    "untouched": {"sparsity_weight": 0, "max_epochs": 0},
    "weight 0": {"sparsity_weight": 0},
    "weight 0.2": {"sparsity_weight": 0.2},
}
warnings.filterwarnings("ignore", message="The module given classifies")
detectors = {
    name: SparseEnergyOODDetector(classifier, random_state=0, **each)
    .fit(X_train, y_train)
    .calibrate(X_fresh)
    for name, each in settings.items()
}

# %%
# The ROC and the operating point
# -------------------------------
# Each curve gives what any threshold would keep: of the test digits upwards, of a set of outliers
# to the right. The line is the share of the test digits that the threshold keeps, which was placed
# on fresh digits to keep 95 %; the black markers give the share of each set that it keeps.

DetectionRocDisplay.from_estimator(detectors["weight 0.2"], X_test, outliers)

# %%
# What the penalty does to the features
# -------------------------------------
# The features of each row in descending order, averaged over the rows. The area is the mean L1
# norm; the sparser the rows, the steeper the descent and the higher the Hoyer index.

figure, axes = plt.subplots(2, sharex=True, sharey=True, figsize=(6.4, 7), layout="constrained")
for ax, name in zip(axes, ("weight 0", "weight 0.2"), strict=True):
    FeatureActivityDisplay.from_estimator(detectors[name], X_test, outliers, ax=ax)
    ax.set_title(name)
axes[0].set_xlabel("")

# %%
# The detectors side by side
# --------------------------
# One number for each detector and set. The score that keeps 95 % is here taken from the test rows
# themselves, as published tables do, so that all detectors keep the same share. For several seeds,
# pass their means to ``DetectionTableDisplay`` itself, and their deviations as ``spread``.

DetectionTableDisplay.from_estimator(detectors, X_test, outliers, metric="fpr95")
plt.show()
