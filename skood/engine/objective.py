"""What training minimises: terms of a loss, each a sum over rows divided by their number.

The loss is ``CE(z, y)``, plus each term of `FINE_TUNING_TERMS` times the weight that the detector
has for it. To add a term, write a class of `Term` here, under the decorator that names the
detector's parameter for its weight, and give the detector that parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..penalties import hoyer_index, l1
from .hardware import autocast
from .network import Forward, Network
from .precision import widened
from .teacher import Teacher, Views

DISTILLATION_TEMPERATURE = 2.0


class Pass(NamedTuple):
    """A batch after its forward pass: what the terms of the loss see."""

    inputs: Tensor  # (n, ...), in-distribution rows as the network got them
    features: Tensor  # (n, d)
    logits: Tensor  # (n, K)
    labels: Tensor  # (n,), int64, logit indices
    outlier_logits: Tensor  # (m, K), of the outliers of the batch
    views: Views | None = None  # of the n rows, if they come again as they are


class Counts(NamedTuple):
    """Rows of a whole batch, divided by the number of processes that share it."""

    inliers: float
    outliers: float


class Term:
    """One term of the loss, times its `weight`.

    A term of weight 0 is recorded, and not trained on.
    """

    name: str
    """Its name in ``history_``."""

    parameter: str | None = None
    """The detector's parameter for its weight."""

    of_outliers = False
    """Whether it is a mean over the outliers of a batch, instead of its in-distribution rows."""

    sees_inputs = False
    """Whether it looks at the network's input, which the network may have written into."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = float(weight)

    def start(self, network: Network) -> None:
        """Look at the network before fine-tuning."""

    def __call__(self, batch: Pass) -> Tensor:
        """One value a row."""
        raise NotImplementedError


FINE_TUNING_TERMS: dict[str, type[Term]] = {}
"""Terms beside the cross-entropy and the penalty, by the parameter for their weight."""


def weighted_by(parameter: str) -> Callable[[type[Term]], type[Term]]:
    """Add a term to fine-tuning, under the name of the detector's parameter for its weight."""

    def register(term: type[Term]) -> type[Term]:
        term.parameter = parameter
        FINE_TUNING_TERMS[parameter] = term
        return term

    return register


class CrossEntropy(Term):
    """Cross-entropy between labels and prediction."""

    name = "cross_entropy"

    def __call__(self, batch: Pass) -> Tensor:
        """One value a row."""
        return F.cross_entropy(batch.logits, batch.labels, reduction="none")


class Penalized(Term):
    """A penalty on the features of in-distribution rows.

    Chen & Li, J. Guilin Univ. Electron. Technol. 43(1), 2023.
    """

    name = "penalty"
    parameter = "sparsity_weight"

    def __init__(self, penalty: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__(weight)
        self.penalty = penalty

    def __call__(self, batch: Pass) -> Tensor:
        """One value a row, checked."""
        return self.values(batch.features)

    def values(self, features: Tensor) -> Tensor:
        """Values (n,) of features (n, d), checked."""
        values = self.penalty(features)
        if not isinstance(values, Tensor) or values.shape != (len(features),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"penalty returned {got} for features of shape {tuple(features.shape)}; it must "
                f"return one value per row, a tensor of shape ({len(features)},). Sum over dim=1."
            )
        if not values.is_floating_point():
            raise TypeError(
                f"penalty returned {values.dtype} values; it must return floating ones."
            )
        return values


@weighted_by("outlier_weight")
class Uniformity(Term):
    """Cross-entropy between the uniform distribution and the prediction on outliers.

    Chen & Li, Sci. Rep. 14:28444, 2024.
    """

    name = "outlier"
    of_outliers = True

    def __call__(self, batch: Pass) -> Tensor:
        """One value an outlier."""
        return -F.log_softmax(batch.outlier_logits, dim=1).mean(dim=1)


@weighted_by("distillation_weight")
class Distillation(Term):
    """Divergence from the predictions before fine-tuning.

    It is ``T^2 KL(softmax(z' / T) || softmax(z / T))``, with z' the logits before and T = 2:
    Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", 2015; Li & Hoiem,
    "Learning without forgetting", ECCV 2016, equation 2.
    """

    name = "distillation"
    sees_inputs = True

    def start(self, network: Network) -> None:
        """Keep the network as it is now."""
        self._teacher = Teacher(network)

    def __call__(self, batch: Pass) -> Tensor:
        """One value a row."""
        taught = self._teacher.logits(batch.inputs, batch.views)
        before, now = (
            F.log_softmax(z / DISTILLATION_TEMPERATURE, dim=1)
            for z in (taught.to(batch.logits.dtype), batch.logits)
        )
        divergence = F.kl_div(now, before, reduction="none", log_target=True).sum(dim=1)
        return DISTILLATION_TEMPERATURE**2 * divergence


MEASURES: dict[str, Callable[[Pass], Tensor]] = {
    "accuracy": lambda batch: (batch.logits.argmax(dim=1) == batch.labels).float(),
    "mean_l1": lambda batch: l1(batch.features),
    "hoyer_index": lambda batch: hoyer_index(batch.features),
    "id_energy": lambda batch: -torch.logsumexp(batch.logits, dim=1),
}
"""What is recorded beside the terms of the loss: one value an in-distribution row."""


def pretraining_terms() -> list[Term]:
    """Cross-entropy alone; the L1 norm of the features is recorded."""
    return [CrossEntropy(), Penalized(l1, 0.0)]


def fine_tuning_terms(
    penalty: Callable[[Tensor], Tensor], weights: Mapping[str, float]
) -> list[Term]:
    """Cross-entropy, the penalty whatever its weight, and further terms of positive weight.

    `weights` holds the weights, among others, by the names of the detector's parameters.
    """
    further = [
        term(weights[name]) for name, term in FINE_TUNING_TERMS.items() if weights.get(name, 0) > 0
    ]
    return [CrossEntropy(), Penalized(penalty, weights["sparsity_weight"]), *further]


class Objective(nn.Module):
    """The loss of a batch, as a module around a network, for DistributedDataParallel to wrap.

    It shows the parameters of the network alone: DistributedDataParallel would send all buffers
    before each step.
    """

    def __init__(self, network: Network, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = terms
        self.forward_of_network: Forward = network.trained
        self._precision = network.precision.training
        self._trained = nn.ParameterList(network.module.parameters())

    def forward(
        self, batch: Tensor, labels: Tensor, counts: Counts, views: Views | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch whose first rows are in-distribution.

        Parameters
        ----------
        batch : Tensor of shape (n + m, ...)
            Rows; the m last ones are outliers.
        labels : Tensor of shape (n,), int64
            Logit indices of the first n rows.
        counts : Counts
            Rows of the batch on all processes, per process. A term is a sum over the rows here,
            divided by its count: averaged over processes, it is the mean over all rows.
        views : Views, optional
            Which training rows the first n rows are, if they come again as they are.

        Returns
        -------
        loss : Tensor of shape ()
            The loss.
        record : dict of str to Tensor of shape ()
            "loss", each term and each measure, divided by its count, without a graph.
        """
        n = len(labels)
        inputs = batch[:n]
        if any(term.sees_inputs for term in self.terms):
            inputs = inputs.clone()
        with autocast(batch.device, self._precision):
            features, logits = self.forward_of_network(batch)
        features, logits = widened(features), widened(logits)
        passed = Pass(inputs, features[:n], logits[:n], labels, logits[n:], views)
        loss = logits.new_zeros(())
        record = {}
        for term in self.terms:
            with torch.set_grad_enabled(term.weight > 0):
                count = counts.outliers if term.of_outliers else counts.inliers
                value = term(passed).sum() / count
            record[term.name] = value.detach()
            if term.weight > 0:
                loss = loss + term.weight * value
        with torch.no_grad():
            for name, measure in MEASURES.items():
                record[name] = measure(passed).sum() / counts.inliers
        return loss, {"loss": loss.detach(), **record}
