"""What a model was trained on: ``alpha``, ``sigma`` and the time label at every noise level.

A *level* is the number that diffusers keeps in ``scheduler.sigmas``: ``sigma / alpha`` for variance preserving
and EDM models, ``sigma`` itself for rectified flow. Every function takes and returns float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ZERO_SNR_ALPHA_CUMPROD = 2.0**-24
"""diffusers' last ``alphas_cumprod`` of a schedule rescaled to zero terminal SNR: close to 0, and finite."""


class NoiseSchedule(ABC):
    """The forward process ``x_t = alpha_t x_0 + sigma_t noise`` as a function of the noise level.

    Attributes:
        kind: ``"vp"``, ``"flow"`` or ``"edm"``.
        num_train_timesteps: number of training timesteps.
        max_level: the noisiest level of training.
        min_level: the cleanest level of training, above 0.
    """

    kind: str
    num_train_timesteps: int
    max_level: float
    min_level: float

    @abstractmethod
    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at the levels."""

    @abstractmethod
    def level_of_rho(self, rho: float) -> float:
        """The level with ``sigma / alpha == rho``."""

    @abstractmethod
    def timestep(self, level: ArrayLike) -> Array:
        """The (fractional) time label that the network is given at the levels."""

    @abstractmethod
    def level(self, timestep: ArrayLike) -> Array:
        """The level of (fractional) time labels."""

    @abstractmethod
    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        """Quadrature of ``d rho / d t`` between two values of the interpolation time.

        Returns:
            points ``t_q`` and weights ``w_q`` with ``sum w_q f(t_q) = int f(t) rho'(t) dt`` to float64 rounding for
            polynomials up to degree 4, and the derivative-free check value ``rho(upper) - rho(lower)`` as 0-d array.
        """

    @abstractmethod
    def time(self, level: ArrayLike) -> Array:
        """The model time in which tAB-DEIS interpolates; strictly increasing in the level, finite at level 0."""

    def training_levels(self) -> Array:
        """One level a training timestep, increasing."""
        return self.level(np.arange(self.num_train_timesteps))

    def in_scale(self, level: float) -> float:
        """Factor on the sample before it enters the network."""
        return 1.0


class DiscreteVPSchedule(NoiseSchedule):
    """Variance preserving, from a table of ``alphas_cumprod`` (DDPM, arXiv 2006.11239).

    Levels between two training timesteps are interpolated linearly in ``sigma / alpha`` over the label, labels
    between two levels linearly in ``log(sigma / alpha)``: diffusers' conventions.

    Args:
        alphas_cumprod: float32 ``(T,)``, decreasing, in (0, 1).
    """

    kind = "vp"

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float32)
        if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod must be a vector of at least 2 numbers in (0, 1); check the betas")
        # float32 as in diffusers: the model was trained on exactly these numbers.
        self._table32 = (((1 - table) / table) ** 0.5).numpy()
        self._levels = self._table32.astype(np.float64)
        if not (np.diff(self._levels) > 0).all():
            raise ValueError("alphas_cumprod must decrease strictly; check the betas")
        # diffusers takes the logarithm in float32; labels that it truncates depend on that.
        self._logs = np.log(self._table32).astype(np.float64)
        self.alphas_cumprod = table
        self.num_train_timesteps = len(table)
        self.max_level, self.min_level = float(self._levels[-1]), float(self._levels[0])
        self.log_max_level, self.log_min_level = float(self._logs[-1]), float(self._logs[0])

    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        rho = np.asarray(level, np.float64)
        alpha = 1.0 / np.sqrt(rho * rho + 1.0)
        return alpha, rho * alpha

    def level_of_rho(self, rho: float) -> float:
        return rho

    def timestep(self, level: ArrayLike) -> Array:
        log = np.log(np.maximum(np.asarray(level, np.float64), 1e-10))
        low = np.clip(np.searchsorted(self._logs, log, side="right") - 1, 0, len(self._logs) - 2)
        weight = np.clip((self._logs[low] - log) / (self._logs[low] - self._logs[low + 1]), 0.0, 1.0)
        return (1.0 - weight) * low + weight * (low + 1)

    def level(self, timestep: ArrayLike) -> Array:
        return np.interp(np.asarray(timestep, np.float64), np.arange(len(self._levels)), self._levels)

    def time(self, level: ArrayLike) -> Array:
        # Level 0 stands one label before the first, where diffusers puts alphas_cumprod = 1.
        return np.interp(
            np.asarray(level, np.float64), np.append(0.0, self._levels), np.arange(-1.0, len(self._levels))
        )

    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        first, last = sorted((lower, upper))
        knots = np.arange(math.floor(first) + 1, math.ceil(last))
        edges = np.concatenate([[first], knots, [last]])
        rho = np.interp(edges, np.arange(-1.0, len(self._levels)), np.append(0.0, self._levels))
        points, weights = np.polynomial.legendre.leggauss(3)
        middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
        t = (middle[:, None] + half[:, None] * points).ravel()
        # rho is piecewise linear: its slope times the interval's quadrature weights.
        w = (np.diff(rho)[:, None] * weights / 2).ravel()
        sign = 1.0 if upper >= lower else -1.0
        return t, sign * w, np.asarray(sign * (rho[-1] - rho[0]))

    @staticmethod
    def betas(
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        trained_betas: ArrayLike | None,
        rescale_zero_snr: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(betas, alphas_cumprod)`` in float32 as diffusers makes them.

        Raises:
            ValueError: an unknown ``beta_schedule``, or ``trained_betas`` of another length.
        """
        if trained_betas is not None:
            betas = torch.tensor(np.asarray(trained_betas), dtype=torch.float32)
            if len(betas) != num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(betas)} entries and num_train_timesteps is {num_train_timesteps}; "
                    "pass as many betas as timesteps"
                )
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
        elif beta_schedule == "squaredcos_cap_v2":
            betas = torch.tensor(
                [
                    min(1 - _cosine((i + 1) / num_train_timesteps) / _cosine(i / num_train_timesteps), 0.999)
                    for i in range(num_train_timesteps)
                ],
                dtype=torch.float32,
            )
        else:
            raise ValueError(
                f"beta_schedule {beta_schedule!r} is unknown; use linear, scaled_linear or squaredcos_cap_v2, "
                "or pass trained_betas"
            )
        if rescale_zero_snr:
            betas = _rescale_zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if rescale_zero_snr:
            alphas_cumprod[-1] = ZERO_SNR_ALPHA_CUMPROD
        return betas, alphas_cumprod


class FlowSchedule(NoiseSchedule):
    """Rectified flow: ``alpha = 1 - s``, ``sigma = s``, label ``num_train_timesteps * s`` (arXiv 2403.03206).

    Args:
        num_train_timesteps: factor between level and label.
    """

    kind = "flow"

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.max_level, self.min_level = 1.0, 1.0 / num_train_timesteps

    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        s = np.asarray(level, np.float64)
        return 1.0 - s, s

    def level_of_rho(self, rho: float) -> float:
        return rho / (1.0 + rho) if math.isfinite(rho) else 1.0

    def timestep(self, level: ArrayLike) -> Array:
        return np.asarray(level, np.float64) * self.num_train_timesteps

    def level(self, timestep: ArrayLike) -> Array:
        return np.asarray(timestep, np.float64) / self.num_train_timesteps

    def training_levels(self) -> Array:
        return self.level(np.arange(1, self.num_train_timesteps + 1))

    def time(self, level: ArrayLike) -> Array:
        return np.asarray(level, np.float64)

    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        points, weights = np.polynomial.legendre.leggauss(64)
        # In v = 1 / (1 - t) the measure d rho is d v, flat: accurate up to the noisy end.
        first, last = 1.0 / (1.0 - lower), 1.0 / (1.0 - upper)
        v = (first + last) / 2 + (last - first) / 2 * points
        return 1.0 - 1.0 / v, (last - first) / 2 * weights, np.asarray(last - first)


class EDMSchedule(NoiseSchedule):
    """Variance exploding with the preconditioning of EDM (arXiv 2206.00364, table 1).

    Args:
        sigma_data: standard deviation of the data.
        sigma_min: cleanest level.
        sigma_max: noisiest level.
        num_train_timesteps: kept for diffusers' interface.
    """

    kind = "edm"

    def __init__(
        self, sigma_data: float, sigma_min: float = 0.002, sigma_max: float = 80.0, num_train_timesteps: int = 1000
    ) -> None:
        if not (sigma_data > 0 and 0 < sigma_min < sigma_max):
            raise ValueError(
                f"sigma_data {sigma_data}, sigma_min {sigma_min}, sigma_max {sigma_max}: need 0 < min < max"
            )
        self.sigma_data = sigma_data
        self.num_train_timesteps = num_train_timesteps
        self.max_level, self.min_level = sigma_max, sigma_min

    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        sigma = np.asarray(level, np.float64)
        return np.ones_like(sigma), sigma

    def level_of_rho(self, rho: float) -> float:
        return rho

    def timestep(self, level: ArrayLike) -> Array:
        return 0.25 * np.log(np.asarray(level, np.float64))

    def level(self, timestep: ArrayLike) -> Array:
        return np.exp(4.0 * np.asarray(timestep, np.float64))

    def time(self, level: ArrayLike) -> Array:
        return np.asarray(level, np.float64)

    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        points, weights = np.polynomial.legendre.leggauss(4)
        return (
            (lower + upper) / 2 + (upper - lower) / 2 * points,
            (upper - lower) / 2 * weights,
            np.asarray(upper - lower),
        )

    def training_levels(self) -> Array:
        return np.geomspace(self.min_level, self.max_level, self.num_train_timesteps)

    def in_scale(self, level: float) -> float:
        return 1.0 / math.sqrt(level * level + self.sigma_data**2)


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers scheduler config describes.

    Args:
        config: with the keys of ``ScheduleConfig``; ``sigma_data`` selects EDM, ``use_flow_sigmas`` rectified flow.
    """
    if config.get("sigma_data") is not None:
        return EDMSchedule(
            config["sigma_data"],
            config.get("sigma_min") or 0.002,
            config.get("sigma_max") or 80.0,
            config["num_train_timesteps"],
        )
    if config.get("use_flow_sigmas"):
        return FlowSchedule(config["num_train_timesteps"])
    _, alphas_cumprod = DiscreteVPSchedule.betas(
        config["num_train_timesteps"],
        config["beta_start"],
        config["beta_end"],
        config["beta_schedule"],
        config.get("trained_betas"),
        bool(config.get("rescale_betas_zero_snr")),
    )
    return DiscreteVPSchedule(alphas_cumprod)


def _cosine(t: float) -> float:
    """Nichol and Dhariwal's ``alpha_bar`` (arXiv 2102.09672, equation 17)."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2305.08891."""
    alphas_bar_sqrt = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = alphas_bar_sqrt[0].clone(), alphas_bar_sqrt[-1].clone()
    alphas_bar_sqrt = (alphas_bar_sqrt - last) * (first / (first - last))
    alphas_bar = alphas_bar_sqrt**2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return 1 - alphas
