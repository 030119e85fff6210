"""Solvers of other libraries, where they are installed, on the problems of ``convergence``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .convergence import Convergence, Problem, convergence, grid

LIBRARIES: Mapping[str, str] = {"k_diffusion": "k-diffusion", "azula": "azula"}
"""Module -> name."""

K_DIFFUSION: Mapping[str, tuple[int, dict[str, Any]]] = {
    "sample_euler": (1, {}),
    "sample_heun": (2, {}),
    "sample_dpm_2": (2, {}),
    "sample_lms": (4, {}),
    "sample_dpmpp_2s_ancestral": (2, {"eta": 0.0}),
    "sample_dpmpp_2m": (2, {}),
    "sample_dpmpp_2m_sde": (2, {"eta": 0.0}),
    "sample_dpmpp_3m_sde": (3, {"eta": 0.0}),
}
"""Function -> stated order and arguments; without churn the SDE solvers solve the ODE."""

AZULA: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "DDIMSampler": ("DDIMSampler", 1, {}),
    "HeunSampler": ("HeunSampler", 2, {}),
    **{
        f"{name} {order}": (name, order, {"order": order})
        for name in ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler", "REABSampler")
        for order in (2, 3)
    },
}
"""Class, stated order and arguments."""


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [name for module, name in LIBRARIES.items() if importlib.util.find_spec(module) is None]


def foreign_orders() -> Iterator[Convergence]:
    """The convergence of every solver whose library is installed."""
    absent = missing()
    if "k-diffusion" not in absent:
        sampling = importlib.import_module("k_diffusion.sampling")
        for name, (stated, options) in K_DIFFUSION.items():
            yield convergence(name, "k-diffusion", stated, _KDiffusion(getattr(sampling, name), stated, options))
    if "azula" not in absent:
        for name, (sampler, stated, options) in AZULA.items():
            yield convergence(name, "azula", stated, _Azula(sampler, stated, options))


class _KDiffusion:
    """A function ``sample(model, x, sigmas)`` in coordinates where alpha is 1."""

    def __init__(self, sample: Any, stated: int, options: Mapping[str, Any]) -> None:
        self.sample, self.options = sample, dict(options)
        if "eta" in options:
            # Not read, but the default draws a Brownian tree.
            self.options["noise_sampler"] = lambda sigma, sigma_next: torch.zeros(())
        self.ramp = stated - 1 if stated > 2 else 0

    def __call__(self, problem: Problem, steps: int) -> torch.Tensor:
        levels = torch.from_numpy(grid(steps))
        calls = 0

        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            if 0 < calls <= self.ramp:
                x.copy_(problem.exact(steps, calls) / (1.0 - levels[calls]))
            calls += 1
            return problem.clean(x, 1.0, float(sigma[0]))

        start = problem.start / (1.0 - levels[0])
        result = self.sample(model, start, levels / (1.0 - levels), disable=True, **self.options)
        return torch.as_tensor(result * (1.0 - levels[-1]))


class _Azula:
    """A class ``Sampler(denoiser, start, stop, steps)`` over a schedule of time."""

    def __init__(self, sampler: str, stated: int, options: Mapping[str, Any]) -> None:
        self.sampler, self.options = sampler, options
        self.ramp = stated - 1 if stated > 2 else 0

    def __call__(self, problem: Problem, steps: int) -> torch.Tensor:
        denoise, noise, sample = (importlib.import_module(f"azula.{name}") for name in ("denoise", "noise", "sample"))
        levels = torch.from_numpy(grid(steps))
        ramp = self.ramp

        class Schedule(noise.Schedule):  # type: ignore[name-defined]
            def __call__(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                sigma = levels[((1.0 - t) * steps).round().long()]
                return 1.0 - sigma, sigma

        class Denoiser(denoise.Denoiser):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.schedule, self.calls = Schedule(), 0

            def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> Any:
                if 0 < self.calls <= ramp:
                    x_t.copy_(problem.exact(steps, self.calls))
                self.calls += 1
                alpha, sigma = (float(v) for v in self.schedule(t))
                return denoise.DiracPosterior(problem.clean(x_t, alpha, sigma))

        solver = getattr(sample, self.sampler)(
            Denoiser(), steps=steps, silent=True, dtype=torch.float64, **self.options
        )
        return torch.as_tensor(solver(problem.start.clone()))
