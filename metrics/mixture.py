"""Gaussian mixtures: data whose diffusion is known in closed form, the ground truth of tests and benchmarks."""

from __future__ import annotations

import math

import torch


class GaussianMixture:
    """``sum_k weight_k N(mean_k, std_k^2 I)`` with the exact predictions of an ideal diffusion model.

    Args:
        means: ``(components, dimensions)``.
        stds: ``(components,)``, positive.
        weights: ``(components,)``, positive; normalised here.
        dtype: of all arithmetic.
    """

    def __init__(
        self,
        means: torch.Tensor,
        stds: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != means.shape[:1]:
            raise ValueError("means must be (K, D), stds and weights (K,)")
        self.means, self.stds = means.to(dtype), stds.to(dtype)
        self.weights = (weights / weights.sum()).to(dtype)

    @classmethod
    def random(cls, components: int = 10, dimensions: int = 64, seed: int = 0) -> GaussianMixture:
        """A mixture on the scale of normalised images: unit variance over all, narrow components."""
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, dimensions, generator=generator, dtype=torch.float64)
        stds = 0.1 + 0.3 * torch.rand(components, generator=generator, dtype=torch.float64)
        weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
        return cls(means, stds, weights)

    def component(self, k: int) -> GaussianMixture:
        """One component alone: the class-conditional data."""
        return GaussianMixture(self.means[k : k + 1], self.stds[k : k + 1], self.weights[k : k + 1])

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``(count, dimensions)`` independent samples."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[index] + self.stds[index, None] * noise

    def clean(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """``E[x_0 | x_t]`` at ``x_t = alpha x_0 + sigma noise``.

        Args:
            sample: ``(batch, ...)`` with ``dimensions`` numbers a sample.
            alpha: signal coefficient, at least 0.
            sigma: noise coefficient, at least 0; not both zero.
        """
        x = sample.reshape(len(sample), -1).to(self.means.dtype)
        variance = alpha**2 * self.stds**2 + sigma**2
        shift = x[:, None, :] - alpha * self.means
        log_density = self.weights.log() - 0.5 * shift.square().sum(-1) / variance - 0.5 * x.shape[1] * variance.log()
        posterior = torch.softmax(log_density, dim=1)
        gain = alpha * self.stds**2 / variance
        clean = torch.einsum("bk,bkd->bd", posterior, self.means + gain[:, None] * shift)
        return clean.reshape(sample.shape)

    def predict(self, sample: torch.Tensor, alpha: float, sigma: float, prediction_type: str) -> torch.Tensor:
        """What an ideal network of the given prediction type returns.

        Raises:
            ValueError: an unknown prediction type.
        """
        clean = self.clean(sample, alpha, sigma)
        if prediction_type == "sample":
            return clean
        noise = (sample.to(clean.dtype) - alpha * clean) / sigma
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return alpha * noise - sigma * clean
        if prediction_type == "flow_prediction":
            return noise - clean
        raise ValueError(f"prediction_type {prediction_type!r} is unknown")

    def solve(
        self,
        sample: torch.Tensor,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        guidance: GuidedPair | None = None,
    ) -> torch.Tensor:
        """The probability flow ODE from ``(alpha, sigma)`` to ``(alpha, sigma)``, to about 1e-12.

        Args:
            sample: ``(batch, dimensions)`` at the start.
            start: noise level where the sample stands, ``alpha > 0``.
            end: noise level of the result; ``sigma`` may be 0.
            guidance: predictions of a guided model in the place of the mixture's own.
        """
        from scipy.integrate import solve_ivp

        model = guidance or self
        rho_start, rho_end = start[1] / start[0], end[1] / end[0]
        # In z = x / sqrt(alpha^2 + sigma^2) over theta = atan(rho) nothing is singular at either end.
        theta = (math.atan(rho_start), math.atan(rho_end))

        def velocity(angle: float, z: object) -> object:
            state = torch.as_tensor(z, dtype=torch.float64).reshape(sample.shape)
            alpha, sigma = math.cos(angle), math.sin(angle)
            clean = model.clean(state, alpha, sigma)
            noise = (state - alpha * clean) / sigma if sigma > 1e-12 else torch.zeros_like(state)
            return (alpha * noise - sigma * clean).reshape(-1).numpy()

        scale = math.hypot(*start)
        initial = (sample.double() / scale).reshape(-1).numpy()
        solution = solve_ivp(velocity, theta, initial, method="DOP853", rtol=1e-11, atol=1e-12)
        return torch.from_numpy(solution.y[:, -1]).reshape(sample.shape) * math.hypot(*end)


class GuidedPair:
    """Classifier-free guidance between two exact models.

    Args:
        conditional: data of the class.
        unconditional: all data.
        scale: guidance scale; 1 is the conditional model.
    """

    def __init__(self, conditional: GaussianMixture, unconditional: GaussianMixture, scale: float) -> None:
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale

    def clean(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """The guided clean prediction."""
        free = self.unconditional.clean(sample, alpha, sigma)
        return free + self.scale * (self.conditional.clean(sample, alpha, sigma) - free)
