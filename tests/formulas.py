"""The loss, its gradient and a training, written once more in numpy and float64."""

from __future__ import annotations

import math

import numpy as np

N_CLASSES = 3


def numpy_forward(parameters, X):
    weight1, bias1, weight2, bias2 = parameters
    hidden = np.maximum(X @ weight1.T + bias1, 0)
    return hidden, hidden @ weight2.T + bias2


def numpy_log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def numpy_penalty(name, hidden):
    norm1 = np.abs(hidden).sum(axis=1)
    return norm1 if name == "l1" else norm1 / np.sqrt((hidden**2).sum(axis=1))


def numpy_divergence(taught, logits, temperature=2.0):
    """Kullback-Leibler divergence of softened predictions from those taught, times T squared.

    Softened by T, gradients shrink by T squared, which the factor makes good.
    """
    before = numpy_log_softmax(taught / temperature)
    now = numpy_log_softmax(logits / temperature)
    return temperature**2 * (np.exp(before) * (before - now)).sum(axis=1)


def numpy_uniformity(logits):
    """Cross-entropy between the uniform distribution and predictions."""
    return -(numpy_log_softmax(logits) / logits.shape[1]).sum(axis=1)


def numpy_loss(parameters, X, labels, outliers, name, weight, outlier_weight):
    hidden, logits = numpy_forward(parameters, X)
    cross_entropy = -numpy_log_softmax(logits)[np.arange(len(labels)), labels].mean()
    loss = cross_entropy + weight * numpy_penalty(name, hidden).mean()
    if outlier_weight > 0:
        outlier_logits = numpy_forward(parameters, outliers)[1]
        loss += outlier_weight * numpy_uniformity(outlier_logits).mean()
    return loss


def numpy_gradient(parameters, *args):
    """Central differences in float64."""
    gradients = []
    for parameter in parameters:
        gradient = np.empty_like(parameter)
        for position in np.ndindex(parameter.shape):
            value, step = parameter[position], 1e-6
            parameter[position] = value + step
            above = numpy_loss(parameters, *args)
            parameter[position] = value - step
            below = numpy_loss(parameters, *args)
            parameter[position] = value
            gradient[position] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients


def cosine(recipe, n_steps):
    low, high = min(recipe.final_learning_rate, recipe.learning_rate), recipe.learning_rate
    return [low + (high - low) * (1 + math.cos(math.pi * t / n_steps)) / 2 for t in range(n_steps)]


def numpy_training(parameters, X, labels, batches, recipe, name, weight, outlier_weight):
    """Nesterov momentum as in Sutskever et al. (2013), in the form that torch uses."""
    velocities = [np.zeros_like(parameter) for parameter in parameters]
    for rows, rate in zip(batches, cosine(recipe, len(batches)), strict=True):
        inliers = [row for row in rows if row < len(labels)]
        outliers = [row for row in rows if row >= len(labels)]
        gradients = numpy_gradient(
            parameters, X[inliers], labels[inliers], X[outliers], name, weight, outlier_weight
        )
        for parameter, gradient, velocity in zip(parameters, gradients, velocities, strict=True):
            decayed = gradient + recipe.weight_decay * parameter
            velocity *= recipe.momentum
            velocity += decayed
            parameter -= rate * (decayed + recipe.momentum * velocity)
    return parameters
