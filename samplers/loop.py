"""The loop of a pipeline outside of it: a denoiser and a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .denoisers.denoiser import Denoiser


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: Any,
    num_inference_steps: int,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a scheduler over a denoiser: the latents that the pipeline's call ends with.

    Args:
        denoiser: of a pipeline with its prompts.
        scheduler: of ours or of diffusers, such as ``UniPCScheduler.from_config(denoiser.scheduler_config)``.
        num_inference_steps: number of steps.
        generator: of the first noise and of the noise of stochastic schedulers (also where the pipeline does not hand
            it to its steps: SD3, Flux, DiT); a list gives each sample its own.
        latents: standard normal noise to start from, ``(batch, *shape)``.

    Returns:
        ``(batch, *shape)``, for ``denoiser.decode``.

    Raises:
        ValueError: what ``prepare`` refuses.
    """
    x, timesteps = denoiser.prepare(scheduler, num_inference_steps, generator=generator, latents=latents)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = list(generator) if isinstance(generator, Sequence) else generator
    scaled = hasattr(scheduler, "scale_model_input")  # flow matching of diffusers has none
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(denoiser(seen, t), t, x, **extra, return_dict=False)[0]
    return x
