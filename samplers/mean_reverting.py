"""The process of mean-reverting diffusion for image restoration (IR-SDE, arXiv 2301.11699).

It turns a clean image ``x_0`` into its degraded version ``mu`` plus noise:

    dx = theta_t (mu - x) dt + sqrt(2 theta_t) sigma_inf dw
    x_t = alpha_t x_0 + (1 - alpha_t) mu + sigma_inf sqrt(1 - alpha_t^2) eps,    alpha_t = exp(-int theta)

The residual ``y = (x - mu) / sigma_inf`` obeys ``y_t = alpha_t y_0 + sqrt(1 - alpha_t^2) eps``: a variance preserving
process with the same noise. So every solver serves, on the residual (``mr_sampler.py``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from .schedule import Array, NoiseSchedule

THETA_SCHEDULES = ("constant", "linear", "cosine")


class MeanRevertingSchedule(NoiseSchedule):
    """The residual's variance preserving process, labels 0 to T (arXiv 2301.11699).

    Levels are ``sigma / alpha`` of the residual. Between labels ``int theta`` is interpolated linearly, from which
    ``alpha`` and ``sigma`` follow together (the released MR Sampler interpolates them and the logarithm of
    their ratio, which then contradict each other).

    Args:
        theta_schedule: ``constant``, ``linear`` or ``cosine``.
        num_train_timesteps: T, the label of the noisiest level.
        final_alpha: ``alpha`` there, in (0, 1).
        mr_sampler_tables: the released MR Sampler's tables, whose label 0 lies one ``theta`` above the clean image.

    Raises:
        ValueError: an unknown schedule, fewer than two timesteps, or a ``final_alpha`` outside (0, 1).
    """

    kind = "vp"

    def __init__(
        self,
        theta_schedule: str = "cosine",
        num_train_timesteps: int = 100,
        final_alpha: float = 0.005,
        *,
        mr_sampler_tables: bool = False,
    ) -> None:
        if theta_schedule not in THETA_SCHEDULES:
            raise ValueError(f"theta_schedule {theta_schedule!r} is unknown; use one of {', '.join(THETA_SCHEDULES)}")
        if int(num_train_timesteps) != num_train_timesteps or num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps {num_train_timesteps} must be a whole number of at least 2")
        if not 0.0 < final_alpha < 1.0:
            raise ValueError(f"final_alpha {final_alpha} must lie between 0 and 1; trained models use 0.005")
        theta = _theta(theta_schedule, int(num_train_timesteps))
        labels = np.arange(len(theta), dtype=np.float64)
        if mr_sampler_tables:
            # Level 0 stands one label before the first.
            labels, theta = np.append(-1.0, labels), np.append(0.0, theta)
        total = np.cumsum(theta) - theta[0]
        # The length of a time unit is what makes alpha end at final_alpha.
        self._labels, self._integral = labels, total * (-math.log(final_alpha) / total[-1])
        # Labels 0 to T, so one more than T.
        self.num_train_timesteps = int(num_train_timesteps) + 1
        levels = self.training_levels()
        self.max_level, self.min_level = float(levels[-1]), float(levels[levels > 0][0])

    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        rho = np.asarray(level, np.float64)
        alpha = 1.0 / np.sqrt(rho * rho + 1.0)
        return alpha, rho * alpha

    def level_of_rho(self, rho: float) -> float:
        return rho

    def timestep(self, level: ArrayLike) -> Array:
        return np.maximum(self.time(level), 0.0)

    def level(self, timestep: ArrayLike) -> Array:
        integral = np.interp(np.asarray(timestep, np.float64), self._labels, self._integral)
        return np.asarray(np.sqrt(np.expm1(2.0 * integral)))

    def time(self, level: ArrayLike) -> Array:
        return np.interp(0.5 * np.log1p(np.asarray(level, np.float64) ** 2), self._integral, self._labels)

    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        first, last = sorted((lower, upper))
        knots = np.arange(math.floor(first) + 1, math.ceil(last))
        rho = self.level(np.concatenate([[first], knots, [last]]))
        # In rho the integrand is smooth between two labels; in time it has a pole at the clean end.
        points, weights = np.polynomial.legendre.leggauss(12)
        middle, half = (rho[1:] + rho[:-1]) / 2, np.diff(rho) / 2
        t = self.time((middle[:, None] + half[:, None] * points).ravel())
        sign = 1.0 if upper >= lower else -1.0
        return t, sign * (half[:, None] * weights).ravel(), np.asarray(sign * (rho[-1] - rho[0]))


def _theta(name: str, steps: int) -> Array:
    """``theta`` at the labels 0 to ``steps``, up to a factor."""
    if name == "constant":
        return np.ones(steps + 1)
    if name == "linear":
        scale = 1000.0 / (steps + 1)
        return np.linspace(1e-4 * scale, 2e-2 * scale, steps + 1)
    # One minus alpha_bar of arXiv 2102.09672, equation 17, with two more points than steps.
    points = np.arange(steps + 2) / (steps + 2)
    cosine = np.cos((points + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.asarray(1.0 - cosine[1:] / cosine[0])
