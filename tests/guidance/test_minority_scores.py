"""Minority scores against closed forms, their classes, and the classifier of noised samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from analytic import network_of
from fewstep.guidance import (
    MinorityClasses,
    MinorityClassifier,
    absolute_distance,
    feature_distance,
    minority_scores,
    squared_distance,
)
from fewstep.metrics import GaussianMixture
from fewstep.samplers import DPMSolverPPScheduler
from pipelines.tiny import seeded

KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "sample": {"prediction_type": "sample"},
    "v": {"prediction_type": "v_prediction"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "edm": {"sigma_data": 0.5},
}
LABELS = {"flow": 600.0, "edm": 0.1}
MEAN, VARIANCE = torch.tensor([[0.5, -1.0, 0.2, 0.0]]).double(), 0.36
GAUSSIAN = GaussianMixture(MEAN, torch.tensor([VARIANCE**0.5]).double(), torch.ones(1).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_gaussian_is_its_closed_form(kind: str) -> None:
    """``c1 |x - mean|^2 + c0``: the expected error of a linear prediction."""
    scheduler = DPMSolverPPScheduler(**KINDS[kind])
    timestep = LABELS.get(kind, 400.0)
    x = MEAN + torch.tensor([[0.0], [1.0], [3.0]]) * seeded(1, 4, seed=2).double()
    draws = 1000
    found = minority_scores(network_of(scheduler, GAUSSIAN.clean), scheduler, x, timestep=timestep, draws=draws, seed=1)
    alpha, sigma = (float(v) for v in scheduler.schedule.alpha_sigma(scheduler.schedule.level(timestep)))
    total = alpha**2 * VARIANCE + sigma**2
    away = (x - MEAN).square().sum(1)
    bias, gain = sigma**2 / total, alpha * VARIANCE / total * sigma
    expected = bias**2 * away + 4 * gain**2
    # Of |a + g e|^2 in four dimensions.
    error = ((4 * bias**2 * gain**2 * away + 8 * gain**4) / draws).sqrt()
    assert float(((found - expected).abs() / error).max()) < 4.0
    assert found.dtype == torch.float64


def test_scores_rank_a_mixture_by_its_density() -> None:
    mixture = GaussianMixture(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0]]).double(),
        torch.full((2,), 0.4).double(),
        torch.tensor([0.95, 0.05]).double(),
    )
    scheduler = DPMSolverPPScheduler()
    scores = minority_scores(
        network_of(scheduler, mixture.clean),
        scheduler,
        mixture.means,
        timestep=600.0,
        draws=200,
        distance=absolute_distance,
    )
    assert scores[1] > 3.0 * scores[0]


def test_samples_have_their_own_noise() -> None:
    """The seed is the sample's, whatever the batch."""
    scheduler = DPMSolverPPScheduler()
    network = network_of(scheduler, GAUSSIAN.clean)
    x = seeded(6, 4).double()
    whole = minority_scores(network, scheduler, x, timestep=400.0, draws=3, seed=7)
    parts = [
        minority_scores(network, scheduler, x[k : k + 2], timestep=400.0, draws=3, seed=7 + k) for k in range(0, 6, 2)
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=0)


def test_distances() -> None:
    a, b = seeded(3, 2, 4, 4, seed=0), seeded(3, 2, 4, 4, seed=1)
    difference = (a - b).flatten(1)
    torch.testing.assert_close(squared_distance(a, b), torch.linalg.vector_norm(difference, dim=1) ** 2)
    torch.testing.assert_close(absolute_distance(a, b), torch.linalg.vector_norm(difference, 1, dim=1))
    double = feature_distance(lambda images: 2.0 * images)
    torch.testing.assert_close(double(a, b), 4.0 * squared_distance(a, b))


def test_decoders_are_seen_by_the_distance_alone() -> None:
    scheduler = DPMSolverPPScheduler()
    network = network_of(scheduler, GAUSSIAN.clean)
    x = seeded(2, 4).double()
    plain = minority_scores(network, scheduler, x, timestep=400.0)
    decoded = minority_scores(network, scheduler, x, timestep=400.0, decode=lambda z: 3.0 * z - 1.0)
    torch.testing.assert_close(decoded, 9.0 * plain)


# ------------------------------------------------------------------------------------------------ classes


def test_classes_are_of_equal_size_in_every_group() -> None:
    scores = seeded(600, seed=3).double().exp()
    groups = torch.arange(600) % 3
    scores = scores * 10.0**groups
    cuts = MinorityClasses.of(scores, 10, groups)
    labels = cuts.labels(scores, groups)
    assert cuts.count == 10
    for group in range(3):
        assert torch.bincount(labels[groups == group], minlength=10).tolist() == [20] * 10
        order = scores[groups == group].argsort()
        assert bool((labels[groups == group][order].diff() >= 0).all())
    # Without groups the largest group has nearly all that is rare.
    alone = MinorityClasses.of(scores, 10).labels(scores)
    assert float((groups[alone == 9] == 2).double().mean()) > 0.9


def test_a_score_on_a_threshold_belongs_below() -> None:
    cuts = MinorityClasses(torch.tensor([[1.0, 2.0]]).double())
    assert cuts.labels(torch.tensor([0.5, 1.0, 1.5, 2.0, 9.0])).tolist() == [0, 0, 1, 1, 2]


def test_refusals() -> None:
    scheduler = DPMSolverPPScheduler()
    network = network_of(scheduler, GAUSSIAN.clean)
    x = seeded(2, 4).double()
    with pytest.raises(ValueError, match="draws 0 must be at least 1"):
        minority_scores(network, scheduler, x, timestep=400.0, draws=0)
    for impossible in (-5.0, 1200.0):
        flow = DPMSolverPPScheduler(**KINDS["flow"])
        with pytest.raises(ValueError, match="lies outside the model's training"):
            minority_scores(network, flow, x, timestep=impossible)
    with pytest.raises(ValueError, match=r"distance returned \(2, 4\); return a tensor \(2,\)"):
        minority_scores(network, scheduler, x, timestep=400.0, distance=torch.sub)
    scores = torch.arange(4.0)
    with pytest.raises(ValueError, match="classes 1 must be at least 2"):
        MinorityClasses.of(scores, 1)
    with pytest.raises(ValueError, match="group 0 has 4 scores; give at least 5"):
        MinorityClasses.of(scores, 5)
    with pytest.raises(ValueError, match=r"groups \(3,\) must be 4 integers"):
        MinorityClasses.of(scores, 2, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite numbers"):
        MinorityClasses.of(scores / 0.0, 2)
    with pytest.raises(ValueError, match="groups goes up to 1; thresholds are known of 1"):
        MinorityClasses.of(scores, 2).labels(scores, torch.tensor([0, 0, 1, 1]))


# ------------------------------------------------------------------------------------------------ the classifier


def small(**options: Any) -> MinorityClassifier:
    torch.manual_seed(0)
    return MinorityClassifier(**{"channels": 2, "size": 4, "classes": 3, "width": 8, **options}).eval()


def test_logits_are_the_same_for_every_schedule() -> None:
    """VP, flow and EDM samples of the same signal-to-noise ratio are one sample in other units."""
    model, clean, noise = small(), seeded(4, 2, 4, 4, seed=0), seeded(4, 2, 4, 4, seed=1)
    logits = [model(a * clean + s * noise, a, s) for a, s in ((0.6, 0.8), (3 / 7, 4 / 7), (1.0, 4 / 3))]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-5)
    one_each = model(0.6 * clean + 0.8 * noise, torch.full((4,), 0.6), torch.full((4,), 0.8))
    torch.testing.assert_close(logits[0], one_each)


def test_guidance_stays_bounded_up_to_pure_noise() -> None:
    """The shift of the clean prediction, ``sigma^2 / alpha`` times the gradient, at zero terminal SNR and near it."""
    model = small()
    shifts = []
    for alpha in (2.0**-3, 2.0**-12, 2.0**-20):
        sigma = (1.0 - alpha**2) ** 0.5
        x = seeded(4, 2, 4, 4, seed=1).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x, alpha, sigma).log_softmax(1)[:, 2].sum(), x)
        shifts.append(float((sigma**2 / alpha * gradient).norm()))
    assert shifts[1] == pytest.approx(shifts[2], rel=1e-2)
    assert 0.0 < shifts[2] < 10.0 * shifts[0]
    torch.testing.assert_close(model(x, 0.0, 1.0)[0], model(2.0 * x, 0.0, 1.0)[1])


def test_saved_classifiers_are_the_same(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    loaded = MinorityClassifier.from_pretrained(tmp_path)
    x = seeded(2, 2, 4, 4)
    assert torch.equal(loaded(x, 0.8, 0.6), model(x, 0.8, 0.6))
    with pytest.raises(ValueError, match=r"takes \(batch, 2, 4, 4\)"):
        loaded(seeded(2, 1, 4, 4), 0.8, 0.6)
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "classes": 4}))
    with pytest.raises(ValueError, match="another kind of model than MinorityClassifier"):
        MinorityClassifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json and model\.safetensors missing"):
        MinorityClassifier.from_pretrained(tmp_path / "nowhere")
