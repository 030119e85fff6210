from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from fewstep.metrics import class_agreement, inception_score


def test_inception_score_of_certain_and_balanced_predictions_is_the_number_of_classes() -> None:
    score = inception_score(torch.eye(7).repeat(20, 1), splits=10)
    assert score.mean == pytest.approx(7.0, rel=1e-12)
    assert score.spread == pytest.approx(0.0, abs=1e-12)


def test_inception_score_is_one_where_predictions_do_not_differ() -> None:
    assert inception_score(torch.tensor([[0.7, 0.2, 0.1]]).repeat(50, 1)).mean == pytest.approx(1.0, rel=1e-12)


def test_inception_score_of_two_kinds_in_closed_form() -> None:
    p = 0.9
    score = inception_score(torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64), splits=1)
    assert score.mean == pytest.approx(2.0 * p**p * (1 - p) ** (1 - p), rel=1e-12)
    assert score.spread == 0.0


def test_inception_score_agrees_with_torchmetrics() -> None:
    logits = 3.0 * torch.randn(400, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Torchmetrics shuffles with the global generator: the same permutation gives the same parts.
    torch.manual_seed(5)
    order = torch.randperm(400)
    reference = TorchmetricsInceptionScore(feature=nn.Identity(), splits=8)
    reference.features.append(logits)
    torch.manual_seed(5)
    mean, spread = reference.compute()
    score = inception_score(logits[order].softmax(1), splits=8)
    assert score.mean == pytest.approx(float(mean), rel=1e-10)
    assert score.spread == pytest.approx(float(spread) * math.sqrt(7 / 8), rel=1e-10)


def test_inception_score_draws_nothing() -> None:
    p = torch.randn(100, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    state = torch.random.get_rng_state()
    assert inception_score(p) == inception_score(p)
    assert torch.equal(state, torch.random.get_rng_state())


def test_inception_score_refuses_what_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="apply softmax"):
        inception_score(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="splits=10"):
        inception_score(torch.eye(3))
    with pytest.raises(ValueError, match=r"give \(N, K\)"):
        inception_score(torch.ones(3))
    with pytest.raises(ValueError, match="apply softmax"):
        inception_score(torch.full((20, 3), math.nan))


@pytest.mark.parametrize(("right", "count"), [(0, 20), (3, 20), (970, 1000), (50, 50)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_class_agreement_has_wilsons_interval(right: int, count: int, confidence: float) -> None:
    labels = torch.arange(count) % 10
    answers = torch.where(torch.arange(count) < right, labels, (labels + 1) % 10)
    logits = nn.functional.one_hot(answers, 10).float()
    agreement = class_agreement(logits, labels, confidence)
    interval = scipy.stats.binomtest(right, count).proportion_ci(confidence, method="wilson")
    assert agreement.rate == right / count
    assert agreement.samples == count
    assert agreement.low == pytest.approx(interval.low, abs=1e-12)
    assert agreement.high == pytest.approx(interval.high, abs=1e-12)


def test_class_agreement_refuses_bad_input() -> None:
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="disagree"):
        class_agreement(logits, labels[:3])
    with pytest.raises(ValueError, match="disagree"):
        class_agreement(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="integers from 0 to 2"):
        class_agreement(logits, labels + 1)
    with pytest.raises(ValueError, match="NaN"):
        class_agreement(logits * math.nan, labels)
    with pytest.raises(ValueError, match="confidence=95"):
        class_agreement(logits, labels, 95)
