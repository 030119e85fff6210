"""Denoisers whose runs are known exactly, to stand in for the network of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Level = Callable[[float], tuple[float, float]]
"""Signal and noise coefficient at a time label."""


def vp_level(alphas_cumprod: torch.Tensor) -> Level:
    """The level of a label in a table, between two labels by the logarithm of sigma / alpha."""
    table = alphas_cumprod.double().numpy()
    logs = 0.5 * np.log((1 - table) / table)

    def level(label: float) -> tuple[float, float]:
        rho = math.exp(float(np.interp(label, np.arange(len(logs)), logs)))
        alpha = 1 / math.sqrt(1 + rho * rho)
        return alpha, rho * alpha

    return level


def flow_level(label: float) -> tuple[float, float]:
    return 1 - label / 1000, label / 1000


class GaussianDenoiser(torch.nn.Module):
    """The optimal prediction for Gaussian data whose mean is the first number of the prompt's embedding.

    Guidance extrapolates the mean, so a guided run is the exact run of another Gaussian.

    Args:
        like: the network that it takes the place of.
        level: of a time label.
        spread: standard deviation of the data; 0 puts all data into one point.
        flow: predict ``noise - clean`` rather than the noise.
    """

    def __init__(self, like: Any, level: Level, *, spread: float, flow: bool) -> None:
        super().__init__()
        self.config, self.dtype, self.device = like.config, torch.float32, torch.device("cpu")
        self.level, self.spread, self.flow = level, spread, flow

    def forward(
        self,
        sample: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *,
        encoder_hidden_states: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor]:
        x = sample if sample is not None else hidden_states
        assert x is not None
        assert timestep is not None
        alpha, sigma = self.level(float(timestep.flatten()[0]))
        mean = encoder_hidden_states[:, 0, 0].view(-1, 1, 1, 1)
        variance = alpha**2 * self.spread**2 + sigma**2
        away = x - alpha * mean
        noise = sigma / variance * away
        clean = mean + alpha * self.spread**2 / variance * away
        return (noise - clean if self.flow else noise,)

    def solution(
        self, start: torch.Tensor, mean: float, first: tuple[float, float], last: tuple[float, float]
    ) -> torch.Tensor:
        """The probability flow from one (alpha, sigma) to another, in float64."""
        stds = [math.hypot(alpha * self.spread, sigma) for alpha, sigma in (first, last)]
        return last[0] * mean + stds[1] / stds[0] * (start.double() - first[0] * mean)


def guided_mean(inputs: dict[str, Any], scale: float) -> float:
    """The mean that classifier-free guidance makes of the two prompts."""
    conditional, unconditional = (float(inputs[f"{p}prompt_embeds"][0, 0, 0]) for p in ("", "negative_"))
    return unconditional + scale * (conditional - unconditional)
