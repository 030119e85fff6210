"""Claims on steering: their quick forms, and the statistics that decide on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.metrics import GaussianMixture
from fewstep.scripts.replication.claims import HOLDS, IN_PART, NOT_HERE, VERDICTS, Scale
from fewstep.scripts.replication.known_laws import _apart, _mode_weights, leave_one_out, mean_of
from fewstep.scripts.replication.steering import CLAIMS

EXPECTED = {
    "fkc": HOLDS,
    "fk-steering": HOLDS,
    "svdd": IN_PART,  # one population for all images has the higher reward
    "dts": NOT_HERE,  # particles do as well in two dimensions
    "dts-star": NOT_HERE,
    "minority": HOLDS,
    "noise-search": HOLDS,
    "masked": HOLDS,
}
MEASURES = {claim.key: claim.measure for claim in CLAIMS}


def test_every_claim_is_measured() -> None:
    assert list(MEASURES) == list(EXPECTED)


@pytest.mark.parametrize("key", EXPECTED)
def test_verdicts_are_no_worse_than_they_were(key: str, tmp_path: Path) -> None:
    found = MEASURES[key](Scale(quick=True, folder=tmp_path))
    assert VERDICTS.index(found.verdict) >= VERDICTS.index(EXPECTED[key]), found.findings


def test_mode_weights_of_powers_are_those_of_gaussians() -> None:
    """Far apart, ``p^g`` has the weights ``w^g s^(2 - 2 g)``, with the noise in the variances ``s^2``."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, torch.tensor([0.3, 0.8]), torch.tensor([0.2, 0.8]))
    for exponent in (0.8, 1.0, 2.0):
        variance = mixture.stds**2 + 0.25
        expected = mixture.weights**exponent * variance ** (1.0 - exponent)
        found = _mode_weights([(mixture, exponent)], means, 0.5)
        torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-3, atol=1e-4)
    # The product of equal ones is their square.
    squared = _mode_weights([(mixture, 1.0), (mixture, 1.0)], means, 0.5)
    torch.testing.assert_close(squared, _mode_weights([(mixture, 2.0)], means, 0.5))


def test_wrong_weights_are_more_than_chance() -> None:
    truth = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    draws = torch.distributions.Multinomial(512, truth)
    torch.manual_seed(0)
    shares = draws.sample(torch.Size([2000])).view(100, 20, 3) / 512
    verdicts = [_apart("", part, truth).verdict for part in shares]
    # Bonferroni's bound on the false alarms of a test at 5 %.
    assert 1 <= verdicts.count(NOT_HERE) <= 12
    off = torch.tensor([0.22, 0.28, 0.5], dtype=torch.float64)
    assert all(_apart("", part, off).verdict == NOT_HERE for part in shares[:20])


def test_intervals_of_means_are_students() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    found = mean_of("", values, "at least")
    # The 97.5 % quantile of Student's distribution with three degrees of freedom.
    half = 3.1824463 * float(values.std()) / 2.0
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-5)
    assert found.verdict == HOLDS
    # The jackknife of a mean is the same.
    assert leave_one_out(lambda m: float(values[m].mean()), 4).interval() == pytest.approx((found.low, found.high))
