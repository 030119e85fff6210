"""Scores of classified samples: the inception score and the agreement with the labels asked for."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    spread: float


class Agreement(NamedTuple):
    """A share of successes with the bounds of its confidence interval."""

    rate: float
    low: float
    high: float
    samples: int


def inception_score(
    probabilities: torch.Tensor, splits: int = 10, *, kept: torch.Tensor | None = None
) -> InceptionScore:
    """Inception score of Salimans et al., arXiv 1606.03498: exp of the mean KL(p(y|x) || p(y)).

    The samples are cut into ``splits`` consecutive parts, as in the authors' code; nothing is drawn. Each
    part should hold a fair mixture of the classes: shuffle samples that are sorted by class.

    Args:
        probabilities: ``(N, K)``, non-negative rows that sum to 1.
        splits: number of parts.
        kept: numbers of the samples that count, each in the part that it has among all; by default all do.

    Returns:
        Mean over the parts, between 1 and K, and their standard deviation (of the parts themselves,
        dividing by their number; 0 for one part).

    Raises:
        ValueError: rows are not probabilities, or there are fewer samples than splits, or a part without samples.
    """
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}; give (N, K)")
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits={splits}: give a number from 1 to the {len(probabilities)} samples")
    p = probabilities.detach().to("cpu", torch.float64)
    if not bool((p >= 0).all()) or not bool(((p.sum(1) - 1.0).abs() < 1e-3).all()):
        raise ValueError("probabilities have rows that are negative or do not sum to 1; apply softmax to logits")
    p = p / p.sum(1, keepdim=True)
    counts = torch.ones(len(p), dtype=torch.bool)
    if kept is not None:
        counts = torch.zeros_like(counts).index_fill(0, kept.cpu(), True)
    scores = []
    for part, chosen in zip(p.tensor_split(splits), counts.tensor_split(splits), strict=True):
        samples = part[chosen]
        if not len(samples):
            raise ValueError(f"splits={splits}: none of the samples that are kept is in one of the parts; use fewer")
        marginal = samples.mean(0)
        # The entropies' difference is the mean divergence, and entr(0) = 0 needs no special case.
        entropy = torch.special.entr(marginal).sum() - torch.special.entr(samples).sum(1).mean()
        scores.append(entropy.exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))


def class_agreement(logits: torch.Tensor, labels: torch.Tensor, confidence: float = 0.95) -> Agreement:
    """Share of samples that a classifier takes for the class they were asked to be.

    The interval is Wilson's (Journal of the American Statistical Association 22, 1927), which holds near 0
    and 1 too.

    Args:
        logits: ``(N, K)``, of the classifier.
        labels: ``(N,)`` integers, asked for.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: shapes disagree, there are no samples, a label is not a class, a logit is NaN, or
            ``confidence`` is out of its range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} disagree; give (N, K) and (N,), N > 0"
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {logits.shape[1] - 1}, one for each class of the logits")
    if bool(torch.isnan(logits).any()):
        raise ValueError("logits have NaN; check the images")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95")
    count = len(labels)
    rate = int((logits.argmax(1) == labels.to(logits.device)).sum()) / count
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (rate * (1 - rate) / count + z * z / (4 * count * count)) ** 0.5
    return Agreement(rate, max(centre - half, 0.0), min(centre + half, 1.0), count)
