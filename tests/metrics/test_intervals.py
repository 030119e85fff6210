from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from fewstep.metrics import Estimate, jackknife, jackknife_groups


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_of_a_mean_is_that_of_the_groups_means(confidence: float) -> None:
    """Of equal groups the jackknife of a mean is the textbook's t interval of the groups' means."""
    x = 3.0 + normal(200, 0)
    found = jackknife(lambda kept: float(x[kept].mean()), 200, 20)
    group = jackknife_groups(200, 20)
    means = torch.stack([x[group == g].mean() for g in range(20)]).numpy()
    expected = scipy.stats.t.interval(confidence, 19, loc=means.mean(), scale=scipy.stats.sem(means))
    assert found.value == pytest.approx(float(x.mean()), rel=1e-14)
    assert found.interval(confidence) == pytest.approx(expected, rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of a figure that is no mean and biased in small sets: log of a variance; 0 is its expectation without bias."""
    held = 0
    for seed in range(200):
        x = normal(400, seed)
        low, high = jackknife(lambda kept, x=x: float(x[kept].var().log()), 400, 20).interval(0.9)
        held += low <= 0.0 <= high
    # Binomial: 0.9 of 200 within three deviations.
    assert abs(held - 180) < 3 * math.sqrt(200 * 0.09)


def test_groups_are_equal_always_the_same_and_meet_no_order() -> None:
    group = jackknife_groups(1003, 20)
    assert torch.equal(group, jackknife_groups(1003, 20))
    sizes = torch.bincount(group, minlength=20)
    assert set(sizes.tolist()) == {50, 51}
    classes = torch.arange(1003) % 10
    assert all(len(set(classes[group == g].tolist())) >= 8 for g in range(20))
    assert all(int((group[:100] == g).sum()) < 20 for g in range(20))


def test_groups_have_their_share_of_classes_in_turn() -> None:
    group, classes = jackknife_groups(1003, 20, turn=10), torch.arange(1003) % 10
    assert set(torch.bincount(group, minlength=20).tolist()) == {50, 51}
    table = torch.bincount(group * 10 + classes).view(20, 10)
    assert set(table.flatten().tolist()) <= {5, 6}
    with pytest.raises(ValueError, match="turn=0: give the number of classes"):
        jackknife_groups(100, turn=0)


def test_differences_of_pairs_are_narrower_where_images_have_much_in_common() -> None:
    shared = normal(200, 0)
    a, b = shared + 0.1 * normal(200, 1), shared + 0.1 * normal(200, 2)
    first, second = (jackknife(lambda kept, x=x: float(x[kept].mean()), 200) for x in (a, b))
    difference = first - second
    assert difference.value == pytest.approx(float((a - b).mean()), abs=1e-14)
    low, high = difference.interval()
    expected = jackknife(lambda kept: float((a - b)[kept].mean()), 200).interval()
    assert (low, high) == pytest.approx(expected, abs=1e-13)
    widths = [one.interval()[1] - one.interval()[0] for one in (first, second)]
    assert high - low < 0.3 * min(widths)


def test_bounds_cut_the_interval() -> None:
    assert Estimate(0.99, (0.98, 1.0, 0.99), 0.0, 1.0).interval()[1] == 1.0
    assert Estimate(0.01, (0.0, 0.02, 0.01), 0.0).interval()[0] == 0.0


def test_refusals() -> None:
    for count, groups in ((39, 20), (100, 1)):
        with pytest.raises(ValueError, match=rf"groups={groups} of {count} images"):
            jackknife_groups(count, groups)
    with pytest.raises(ValueError, match="confidence=95"):
        Estimate(0.0, (0.0, 1.0)).interval(95)
