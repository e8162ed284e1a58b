"""
Digits that the classifier has never seen
=========================================

A small convolutional network learns eight of the ten digits. If you show it one of the other two, a
patch of a photograph or plain noise, it still names one of its eight, often with confidence. This
script turns it into a detector in three ways and compares them, all with the energy as score:

* **untouched**: the classifier as it is;
* **weight 0**: fine-tuned without the penalty, the control;
* **weight 0.02**: fine-tuned with the penalty, as in the paper.

Everything is repeated with several seeds, which determine the split, the classifier and the
fine-tuning. Digits show how the detector works. They cannot show whether the penalty pays off: with
about 900 images, seeds usually matter more, and the script says so. That takes more data.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.metrics import detection_report
from skood.plotting import ScoreDistributionDisplay

LEFT_OUT = (8, 9)
SEEDS = range(5)

# %%
# The data
# --------
# The digits that the classifier knows are split into three parts: for training, for the threshold
# and for the test. Outliers come from three sources. All images have 8 x 8 pixels with values from
# 0 to 16.

digits = load_digits()
known = ~np.isin(digits.target, LEFT_OUT)


def split(seed):
    """Training, fresh and test parts of the digits that the classifier knows."""
    images, labels = digits.images[known], digits.target[known]
    X_train, X_rest, y_train, y_rest = train_test_split(
        images, labels, train_size=0.6, stratify=labels, random_state=seed
    )
    X_fresh, X_test, _, y_test = train_test_split(
        X_rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed
    )
    return X_train, y_train, X_fresh, X_test, y_test


def photograph_patches(n_patches, random):
    """Grey 8 x 8 patches of scikit-learn's sample photographs, taken at every fourth pixel."""
    photographs = [image.mean(axis=2)[::4, ::4] for image in load_sample_images().images]
    patches = []
    for _ in range(n_patches):
        photograph = photographs[random.integers(len(photographs))]
        row, column = (random.integers(size - 8) for size in photograph.shape)
        patches.append(photograph[row : row + 8, column : column + 8])
    return np.array(patches) * 16 / 255


random = np.random.default_rng(0)
outliers = {
    f"digits {LEFT_OUT[0]} and {LEFT_OUT[1]}": digits.images[~known],
    "photographs": photograph_patches(500, random),
    "noise": random.uniform(0, 16, size=(500, 8, 8)),
}

# %%
# The classifier
# --------------
# Any torch network that returns logits works. This one is trained in a plain loop.


def train_classifier(X, y, seed):
    """A convolutional network for images of 8 x 8 pixels, trained with Adam."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 8),
    )
    X, y = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(20):
        for index in torch.randperm(len(X)).split(64):
            loss = nn.functional.cross_entropy(network(X[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


# %%
# Three detectors
# ---------------
# The network was trained on the rows that ``fit`` gets, so ``calibrate`` places the threshold on
# fresh rows.

methods = {
    "untouched": {"sparsity_weight": 0, "max_epochs": 0},
    "weight 0": {"sparsity_weight": 0},
    "weight 0.02": {"sparsity_weight": 0.02, "penalty": "l1"},
}

figures = {method: [] for method in methods}
for seed in SEEDS:
    X_train, y_train, X_fresh, X_test, y_test = split(seed)
    classifier = train_classifier(X_train, y_train, seed)
    for method, settings in methods.items():
        detector = SparseEnergyOODDetector(classifier, random_state=seed, **settings)
        detector.fit(X_train, y_train).calibrate(X_fresh)
        scores = {name: detector.score_samples(X) for name, X in outliers.items()}
        report = detection_report(detector.score_samples(X_test), scores).to_dict()
        features = np.abs(detector.features(X_test)).sum(axis=1)
        figures[method].append(
            [report[name]["fpr95"] for name in (*outliers, "mean")]
            + [report["mean"]["auroc"], np.mean(detector.predict_class(X_test) == y_test)]
            + [np.mean(detector.predict(X_test) == 1), features.mean()]
        )
    print(f"seed {seed} of {len(SEEDS)} done", flush=True)

# %%
# Results
# -------
# FPR95 is the share of outliers that are kept at the threshold that keeps 95 % of the test digits.
# Lower is better. "kept" is the share of test digits that the threshold from ``calibrate`` keeps.
# It should be near 95 %.

columns = [*(f"FPR95 {name}" for name in outliers), "FPR95 mean", "AUROC mean", "accuracy", "kept"]
results = {method: np.array(rows) for method, rows in figures.items()}
print(f"\nMean and standard deviation over {len(SEEDS)} seeds, in percent; mean L1 of the features")
print(f"{'':28}" + "".join(f"{method:>18}" for method in methods))
for i, column in enumerate([*columns, "mean L1"]):
    scale = 1 if column == "mean L1" else 100
    cells = [
        f"{scale * rows[:, i].mean():.1f} +- {scale * rows[:, i].std(ddof=1):.1f}"
        for rows in results.values()
    ]
    print(f"{column:28}" + "".join(f"{cell:>18}" for cell in cells))

# %%
# Does the penalty help more than fine-tuning alone? The two are compared seed by seed.


def verdict(better, worse):
    """What the paired differences of the mean FPR95 say."""
    difference = 100 * (results[better] - results[worse])[:, len(outliers)]
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    if abs(mean) <= 2 * error:
        outcome = "no difference that these seeds can show"
    else:
        outcome = "better" if mean < 0 else "worse"
    return (
        f"{better} against {worse}: {mean:+.1f} points of mean FPR95 "
        f"(standard error {error:.1f}): {outcome}"
    )


print()
print(verdict("weight 0.02", "weight 0"))
print(verdict("weight 0.02", "untouched"))

# %%
# The picture
# -----------
# The scores of the last detector, with its threshold.

display = ScoreDistributionDisplay.from_estimator(detector, X_test, outliers)
display.ax_.set_title("Sparse detector, digits")
plt.show()
