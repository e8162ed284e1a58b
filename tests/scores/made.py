"""Features, logits and heads to fit scores to, and what is common to fitting them."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator

from skood.scores import Head, LayeredOutputs, apply_score, fit_score, get_score


class Made(NamedTuple):
    """Rows to fit to, rows to score, and the head that gives the logits of both."""

    fit: LayeredOutputs
    new: LayeredOutputs
    head: Head

    @property
    def arrays(self):
        """Features to fit to, features to score, weight and bias."""
        tensors = (self.fit.features, self.new.features, self.head.weight, self.head.bias)
        return [tensor.numpy() for tensor in tensors]


def made(fit, new, weight, bias, labels=None):
    """Outputs of a head for arrays of features; without labels, the largest logits."""
    head = Head(torch.as_tensor(weight).double(), torch.as_tensor(bias).double())

    def outputs(features, labels=None):
        features = torch.as_tensor(features).double()
        logits = head(features)
        labels = logits.argmax(dim=1) if labels is None else torch.as_tensor(labels)
        return LayeredOutputs(features, logits, labels, layers_of(features))

    return Made(outputs(fit, labels), outputs(new), head)


def relu_features(n_rows=300, n_new=60, width=24, n_classes=4, seed=0):
    """Clusters of features at least 0 with a head that tells them apart, and labels."""
    random = np.random.RandomState(seed)
    centres = random.randn(n_classes, width) * 1.5
    labels = random.randint(n_classes, size=n_rows + n_new)
    features = np.maximum(centres[labels] + random.randn(len(labels), width), 0)
    # Float32, as networks give them.
    features = features.astype(np.float32).astype(np.float64)
    weight, bias = centres + random.randn(n_classes, width) / 10, random.randn(n_classes)
    return features[:n_rows], features[n_rows:], weight, bias, labels[:n_rows]


def usual():
    return made(*relu_features())


def with_dead_features():
    fit, new, weight, bias, labels = relu_features()
    fit[:, ::5] = new[:, ::5] = 0
    return made(fit, new, weight, bias, labels)


def with_rows_of_zeros():
    fit, new, weight, bias, labels = relu_features()
    fit[::7] = new[::7] = 0
    return made(fit, new, weight, bias, labels)


def with_a_constant_feature():
    fit, new, weight, bias, labels = relu_features()
    fit[:, 3] = new[:, 3] = 2.5
    return made(fit, new, weight, bias, labels)


def with_an_absent_class():
    fit, new, weight, bias, labels = relu_features()
    kept = labels != 2
    return made(fit[kept], new, weight, bias, labels[kept])


def of_two_classes():
    return made(*relu_features(n_classes=2))


def of_more_classes_than_features():
    return made(*relu_features(width=5, n_classes=9))


def of_a_large_scale():
    fit, new, weight, bias, labels = relu_features()
    return made(1e3 * fit, 1e3 * new, weight / 1e3, bias, labels)


def in_tight_clusters():
    """Features that nearly coincide within a class, as after long training."""
    fit, new, weight, bias, labels = relu_features()
    centres = np.stack([fit[labels == k].mean(axis=0) for k in range(4)])
    nearest = (new @ weight.T + bias).argmax(axis=1)
    fit, new = centres[labels] + fit / 500, centres[nearest] + new / 500
    return made(fit, new, weight, bias, labels)


AWKWARD = {
    function.__name__: function
    for function in (
        usual,
        with_dead_features,
        with_rows_of_zeros,
        with_a_constant_feature,
        with_an_absent_class,
        of_two_classes,
        of_more_classes_than_features,
        of_a_large_scale,
        in_tight_clusters,
    )
}


def layers_of(features):
    """Moments of an inner layer with as many channels as there are features."""
    return torch.stack([features, 0.1 + features.flip(1).abs()], dim=1)


def pieces(outputs, size):
    """Rows a few at a time, once."""
    for parts in zip(*(tensor.split(size) for tensor in outputs), strict=True):
        yield LayeredOutputs(*parts)


def fitted(score, case, size=None):
    """A score, by name or object, fitted to the rows of a case in one pass."""
    size = len(case.fit.labels) if size is None else size
    held_out = LayeredOutputs(*(tensor[::3] for tensor in case.fit))
    return fit_score(
        get_score(score),
        list(pieces(case.fit, size)),
        lambda: case.head,
        lambda: pieces(held_out, size),
    )


def scores_of(score, case, size=None):
    """Scores of the new rows of a case by a score fitted to its other rows."""
    return seen(fitted(score, case, size), case.new).numpy()


def seen(score, outputs):
    """Scores of rows, by what the score sees of them."""
    return apply_score(score, outputs.features, outputs.logits, outputs.layers)


def picked(outputs, index):
    return LayeredOutputs(*(tensor[index] for tensor in outputs))


def refusal(score, parameter, value):
    """What is said of a value that a parameter cannot have, as a regular expression."""
    return f"The '{parameter}' parameter of {score} must be .* Got {re.escape(repr(value))} instead"


def statistics(score):
    """Fitted attributes as arrays."""
    found = {}
    for name, value in vars(score).items():
        if isinstance(value, Head):
            found |= {f"{name}.weight": value.weight.numpy(), f"{name}.bias": value.bias.numpy()}
        elif isinstance(value, BaseEstimator):
            found |= {f"{name}.{key}": part for key, part in statistics(value).items()}
        elif name.endswith("_"):
            found[name] = np.asarray(value)
    return found
