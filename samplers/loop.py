"""The loop of a pipeline outside of it: a denoiser and a scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .denoisers.denoiser import Denoiser
from .loop_graph import sample_recorded
from .rows import GuidedOutput
from .scheduler import PlanScheduler


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: Any,
    num_inference_steps: int,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    graph: bool = False,
) -> torch.Tensor:
    """Runs a scheduler over a denoiser: the latents that the pipeline's call ends with.

    Args:
        denoiser: of a pipeline with its prompts.
        scheduler: of ours or of diffusers, such as ``UniPCScheduler.from_config(denoiser.scheduler_config)``.
        num_inference_steps: number of steps.
        generator: of the first noise and of the noise of stochastic schedulers (also where the pipeline does not hand
            it to its steps: SD3, Flux, DiT); a list gives each sample its own.
        latents: standard normal noise to start from, ``(batch, *shape)``.
        graph: records the whole run in a CUDA graph the first time, and repeats it for other seeds, prompts, guidance
            scales and plans of the same shape and number of calls; for a scheduler of ours and a ``BranchedDenoiser``.
            A compiled network (``torch.compile``, in a mode without CUDA graphs of its own) is recorded as it is.
            ``clear_graphs`` frees the memory. The denoiser does not count its calls then.

    Returns:
        ``(batch, *shape)``, for ``denoiser.decode``.

    Raises:
        ValueError: what ``prepare`` refuses; ``graph=True`` without CUDA, or with a denoiser or scheduler that does
            more than tensor operations.
    """
    if graph:
        return sample_recorded(denoiser, scheduler, num_inference_steps, generator=generator, latents=latents)
    x, timesteps = denoiser.prepare(scheduler, num_inference_steps, generator=generator, latents=latents)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = list(generator) if isinstance(generator, Sequence) else generator
    # The step may put both outputs of the network together, which is one pass over memory less.
    scale = _guidance_in_steps(denoiser) if isinstance(scheduler, PlanScheduler) else None
    scaled = hasattr(scheduler, "scale_model_input")  # flow matching of diffusers has none
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if scaled else x
        output = denoiser(seen, t) if scale is None else GuidedOutput(*denoiser.branches(seen, t), scale)
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
    return x


def tried(scheduler: Any, num_inference_steps: int) -> Any:
    """A copy of a scheduler with its timesteps set: how many calls a run has, and which of them draw noise.

    Pipelines choose ``mu`` by the size of the image; neither depends on it.
    """
    scheduler = copy.deepcopy(scheduler)
    dynamic = scheduler.config.get("use_dynamic_shifting")
    scheduler.set_timesteps(num_inference_steps, **({"mu": 1.0} if dynamic else {}))
    return scheduler


def _guidance_in_steps(denoiser: Any) -> float | None:
    """The scale of guidance that is nothing but a combination of two outputs."""
    if not getattr(denoiser, "is_guided", False) or denoiser.guidance_rescale > 0.0:
        return None
    return float(denoiser.guidance_scale)
