from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from fewstep.metrics import class_frechet_distances, frechet_distance


def covariance(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def test_one_dimension_in_closed_form() -> None:
    distance = frechet_distance(
        torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[0.25]])
    )
    assert distance == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2, rel=1e-12)


def test_commuting_covariances_in_closed_form() -> None:
    basis = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    a, b = torch.arange(1.0, 10.0, dtype=torch.float64), torch.logspace(-3, 1, 9, dtype=torch.float64)
    mean = torch.linspace(-1, 1, 9, dtype=torch.float64)
    distance = frechet_distance(mean, basis * a @ basis.T, 0 * mean, basis * b @ basis.T)
    assert distance == pytest.approx(float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (16, 1), (64, 2)])
def test_agrees_with_scipy_and_torchmetrics(size: int, seed: int) -> None:
    a, b = covariance(size, seed), 1.7 * covariance(size, seed + 100)
    mean_a, mean_b = torch.linspace(0, 1, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    distance = frechet_distance(mean_a, a, mean_b, b)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    by_scipy = float((mean_a - mean_b).square().sum() + a.trace() + b.trace()) - 2.0 * float(root.trace().real)
    assert distance == pytest.approx(by_scipy, rel=1e-6)
    assert distance == pytest.approx(float(_compute_fid(mean_a, a, mean_b, b)), rel=1e-6)


def test_symmetric_and_zero_for_equal_gaussians() -> None:
    a, b, mean = covariance(32, 3), covariance(32, 4), torch.zeros(32)
    assert frechet_distance(mean, a, mean, b) == pytest.approx(frechet_distance(mean, b, mean, a), rel=1e-10)
    assert 0.0 <= frechet_distance(mean, a, mean, a) < 1e-12 * 32


def test_singular_covariances() -> None:
    # One direction each, at an angle: the overlap is |cos|, and roots of rounding errors would show at 1e-8.
    angle = 0.7
    u = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    v = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    zero = torch.zeros(3)
    distance = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert distance == pytest.approx(2.0 - 2.0 * math.cos(angle), abs=1e-14)
    low = covariance(40, 5, rank=7)
    assert frechet_distance(torch.zeros(40), low, torch.zeros(40), 4.0 * low) == pytest.approx(
        float(low.trace()), rel=1e-9
    )


def test_rounding_of_single_precision_is_forgiven_and_a_wrong_matrix_is_not() -> None:
    size = 48
    low = covariance(size, 6, rank=5)
    single = low.float()
    single += 1e-8 * single.abs().max() * torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros(size)
    assert frechet_distance(mean, single, mean, low) < 1e-3
    with pytest.raises(ValueError, match="covariance_a has the negative eigenvalue"):
        frechet_distance(mean, low - 0.1 * torch.eye(size), mean, low)
    with pytest.raises(ValueError, match="covariance_b is not symmetric"):
        frechet_distance(mean, low, mean, low + torch.triu(torch.ones(size, size), 1))


def test_bad_input() -> None:
    mean, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="shapes disagree"):
        frechet_distance(mean, eye, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="mean_b has shape"):
        frechet_distance(mean, eye, torch.zeros(1, 3), eye)
    with pytest.raises(ValueError, match="covariance_b has values that are not finite"):
        frechet_distance(mean, eye, mean, eye * math.nan)


def test_distance_within_classes() -> None:
    generator = torch.Generator().manual_seed(2)
    features, reference = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (60, 90))
    labels, reference_labels = torch.arange(60) % 3 + 4, torch.arange(90) % 4 + 3
    found = class_frechet_distances(features, labels, reference, reference_labels)
    assert list(found) == [4, 5, 6]
    for label, distance in found.items():
        a, b = features[labels == label], reference[reference_labels == label]
        expected = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
        assert distance == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="class 7 has 60 generated and 0 real images"):
        class_frechet_distances(features, torch.full((60,), 7), reference, reference_labels)
    with pytest.raises(ValueError, match="reference_labels have shape"):
        class_frechet_distances(features, labels, reference, reference_labels[1:])


def test_few_samples_of_many_features_agree_with_scipy() -> None:
    """Singular covariances of real sizes: 40 samples, 100 features."""
    generator = torch.Generator().manual_seed(3)
    a, b = (scale * torch.randn(40, 100, generator=generator, dtype=torch.float64) for scale in (1.0, 1.5))
    moments = [moment for x in (a, b) for moment in (x.mean(0), torch.cov(x.T))]
    # The nonzero eigenvalues of AB are those of a small matrix without roots of zeros.
    ca, cb = ((x - x.mean(0)) / 39**0.5 for x in (a, b))
    overlap = scipy.linalg.svdvals((ca @ cb.T).numpy()).sum()
    expected = float((moments[0] - moments[2]).square().sum() + moments[1].trace() + moments[3].trace()) - 2.0 * overlap
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-10)
