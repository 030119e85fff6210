"""The noise schedule of mean-reverting diffusion: published tables, closed forms and integrals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad

from fewstep.samplers.mean_reverting import MeanRevertingSchedule
from mean_reverting import SIGMA_INF


@pytest.mark.parametrize(
    ("label", "alpha", "sigma", "trained_alpha"),
    [
        (0, 0.999936, 0.002217, 1.0),
        (1, 0.999760, 0.004298, 0.999824),
        (2, 0.999423, 0.006662, 0.999486),
        (10, 0.985302, 0.033494, 0.985365),
        (20, 0.916171, 0.078586, 0.916229),
        (40, 0.569095, 0.161230, 0.569128),
        (60, 0.195361, 0.192300, 0.195370),
        (80, 0.037446, 0.195941, 0.037447),
        (100, 0.005, 0.196076, 0.005),
    ],
)
def test_the_cosine_tables_of_the_released_codes(label: int, alpha: float, sigma: float, trained_alpha: float) -> None:
    """IR-SDE and DA-CLIP train on one table, the MR Sampler samples from another."""
    released, trained = MeanRevertingSchedule(mr_sampler_tables=True), MeanRevertingSchedule()
    found = released.alpha_sigma(released.level(label))
    assert float(found[0]) == pytest.approx(alpha, abs=6e-7)
    assert SIGMA_INF * float(found[1]) == pytest.approx(sigma, abs=6e-7)
    assert float(trained.alpha_sigma(trained.level(label))[0]) == pytest.approx(trained_alpha, abs=6e-7)


def test_constant_and_linear_theta_in_closed_form() -> None:
    labels = np.array([0.0, 1.0, 17.0, 60.5, 100.0])
    constant = MeanRevertingSchedule("constant", final_alpha=0.01)
    np.testing.assert_allclose(constant.alpha_sigma(constant.level(labels))[0], 0.01 ** (labels / 100), rtol=1e-12)
    released = MeanRevertingSchedule("constant", final_alpha=0.01, mr_sampler_tables=True)
    np.testing.assert_allclose(
        released.alpha_sigma(released.level(labels))[0], 0.01 ** ((labels + 1) / 101), rtol=1e-12
    )
    # theta_k = c (1e-4 + k d): its sums over 1..k, at whole labels.
    linear, whole = MeanRevertingSchedule("linear", 50), np.array([0.0, 1.0, 17.0, 50.0])
    integral = whole * 1e-4 + whole * (whole + 1) / 2 * (2e-2 - 1e-4) / 50
    np.testing.assert_allclose(linear.alpha_sigma(linear.level(whole))[0], 0.005 ** (integral / integral[-1]))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_labels_and_levels_are_inverse(name: str, released: bool) -> None:
    schedule = MeanRevertingSchedule(name, mr_sampler_tables=released)
    labels = np.linspace(0.0, 100.0, 333)
    np.testing.assert_allclose(schedule.timestep(schedule.level(labels)), labels, atol=1e-9)
    assert (np.diff(schedule.level(labels)) > 0).all()


@pytest.mark.parametrize("released", [False, True])
def test_integrals_over_time_are_exact_for_polynomials(released: bool) -> None:
    """By parts: int t^k d rho = [t^k rho] - k int t^(k-1) rho dt, whose integrand has no pole at the clean end."""
    schedule = MeanRevertingSchedule(mr_sampler_tables=released)
    lowest = float(schedule.time(0.0))
    for lower, upper in ((60.0, 41.5), (20.0, lowest)):
        t, weights, total = schedule.rho_of_time(lower, upper)
        ends = [float(schedule.level(time)) for time in (lower, upper)]
        assert float(total) == pytest.approx(ends[1] - ends[0], rel=1e-12)
        edges = [upper, *range(math.floor(upper) + 1, math.ceil(lower)), lower]
        for degree in range(1, 5):

            def integrand(v: float, low: float, degree: int = degree) -> float:
                time = low + v * v  # rho begins like this root
                return 2 * v * degree * time ** (degree - 1) * float(schedule.level(time))

            inner = sum(
                quad(integrand, 0.0, math.sqrt(high - low), args=(low,), epsabs=1e-13)[0]
                for low, high in itertools.pairwise(edges)
            )
            expected = upper**degree * ends[1] - lower**degree * ends[0] + inner
            assert float(weights @ t**degree) == pytest.approx(expected, rel=1e-9, abs=1e-9)
