"""Runs diffusers' schedulers and ours side by side, in float64, so that nothing hides behind rounding."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import torch

from analytic import Truth, kind_of, labels, sample
from fewstep.metrics import GaussianMixture

TheirDPM = diffusers.DPMSolverMultistepScheduler
TheirSinglestep = diffusers.DPMSolverSinglestepScheduler
TheirDEIS = diffusers.DEISMultistepScheduler
TheirUniPC = diffusers.UniPCMultistepScheduler
TheirEDM = diffusers.EDMDPMSolverMultistepScheduler

STEPS = (1, 2, 3, 8, 20)
BOOL = (True, False)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
UNIFORM = ("linspace", "leading", "trailing")
RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}

TRUTH = Truth(GaussianMixture.random(4, 6, seed=3))


def error_of(scheduler: Any, steps: int | None = None, **times: Any) -> float:
    """Distance from the exact solution at level 0, wherever the scheduler ends."""
    if steps is not None:
        times["num_inference_steps"] = steps
    scheduler.set_timesteps(**times)
    return TRUTH.error(scheduler, at=0.0)


def noise(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype) * scale


class _Double:
    """``torch`` for a module of diffusers that rounds samples to float32 by name."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def in_double(*schedulers: Any) -> Iterator[None]:
    """Lets the steps of diffusers' classes compute in float64; their times are set before."""
    modules = [importlib.import_module(type(scheduler).__module__) for scheduler in schedulers]
    for module in modules:
        module.torch = _Double()  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]
        torch.set_default_dtype(torch.float32)


class Comparison:
    """Collects what differs over a product of options, and reports it at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.runs = 0

    def images(self, theirs: Any, ours: Any, case: Any, *, run: dict[str, Any] | None = None, **times: Any) -> None:
        """Sets the times of both, and compares levels, labels and images.

        Args:
            theirs: diffusers' scheduler.
            ours: our scheduler.
            case: names the options in the report.
            run: arguments of ``sample``.
            times: arguments of ``set_timesteps``.
        """
        self.runs += 1
        theirs.set_timesteps(**times)
        ours.set_timesteps(**times)
        case = f"{type(theirs).__name__} {case} {times}"
        scale = float(theirs.init_noise_sigma)
        if abs(float(ours.init_noise_sigma) - scale) > 1e-6 * scale:
            self.problems.append(f"{case}: init_noise_sigma {ours.init_noise_sigma}, not {scale}")
        if _differ(ours, theirs):
            self.problems.append(f"{case}: labels {ours.timesteps.tolist()}, not {theirs.timesteps.tolist()}")
        if ours.sigmas.shape != theirs.sigmas.shape or not torch.allclose(ours.sigmas, theirs.sigmas, 4e-6, 1e-7):
            self.problems.append(f"{case}: levels {ours.sigmas.tolist()}, not {theirs.sigmas.tolist()}")
            return
        # diffusers rounds the levels after every operation: from here on both have the same ones.
        schedulers = [theirs, *([theirs.solver_p] if getattr(theirs, "solver_p", None) else [])]
        for scheduler in schedulers:
            scheduler.sigmas = ours.sigmas.double()
        stochastic = str(theirs.config.get("algorithm_type")).startswith("sde")
        options = {**({"seed": 3} if stochastic else {}), **(run or {})}
        start = noise(scale)
        with in_double(*schedulers):
            expected = sample(theirs, start, **options)
        assert expected.dtype == torch.float64
        assert torch.isfinite(expected).all(), f"{case}: diffusers' image is not finite; no case for comparison"
        found = sample(ours, start, **options)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= self.tolerance(ours):
            self.problems.append(f"{case}: images differ by {error:.2g}")

    @staticmethod
    def tolerance(ours: Any) -> float:
        """Rounding of float64; both sides multiply it by the weights, and by the conversion at the noisy end."""
        conversion = max(abs(p) + abs(q) for call in ours.plan for p, q in (call.prediction, call.clean))
        return 1e-12 * max(1.0, ours.plan.amplification) * max(1.0, conversion)

    def report(self, runs: int) -> None:
        """Fails with what differs, and where fewer runs than stated were compared."""
        assert not self.problems, f"{len(self.problems)} differences:\n" + "\n".join(self.problems[:12])
        assert self.runs >= runs, f"only {self.runs} runs were compared"


def _differ(ours: Any, theirs: Any) -> bool:
    """Whether the labels for the network differ."""
    if kind_of(ours) == "flow":
        # Theirs are truncated to integers; ours are the levels.
        return not np.allclose(labels(ours), 1000 * ours.sigmas[:-1].double().numpy(), rtol=1e-6)
    if kind_of(ours) == "edm":
        return not np.allclose(labels(ours), labels(theirs), rtol=0, atol=2e-6)
    return ours.timesteps.dtype != torch.int64 or ours.timesteps.tolist() != theirs.timesteps.tolist()
