"""What tests of denoisers share: a run of ours beside the pipeline's own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin

from fewstep.samplers import Denoiser, sample
from pipelines.tiny import STEPS

REPEATS = {"DDPMPipeline": "batch_size", "WanPipeline": "num_videos_per_prompt"}


def generators(count: int, seed: int = 7) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def pipeline_images(
    pipe: Any, scheduler: SchedulerMixin, inputs: Mapping[str, Any], *, each: int = 1, samples: int = 1, **run: Any
) -> torch.Tensor:
    """What the pipeline's own call makes, as ``pt``."""
    pipe.scheduler = scheduler
    inputs = dict(inputs)
    if "class_labels" in inputs:
        inputs["class_labels"] = [label for label in inputs["class_labels"] for _ in range(each)]
    elif type(pipe).__name__ in ("StableDiffusion3Pipeline", "FluxPipeline") and "prompt" not in inputs:
        # They do not repeat embeddings themselves.
        for name, value in inputs.items():
            inputs[name] = value.repeat_interleave(each, 0) if isinstance(value, torch.Tensor) else value
    else:
        inputs[REPEATS.get(type(pipe).__name__, "num_images_per_prompt")] = each
    run = {"generator": generators(samples), "num_inference_steps": STEPS, "output_type": "pt", **run}
    images: torch.Tensor = pipe(**inputs, **run, return_dict=False)[0]
    return images


def denoiser_images(
    denoiser: Denoiser, scheduler: SchedulerMixin, samples: int = 1, steps: int = STEPS
) -> torch.Tensor:
    """What our loop makes, decoded to ``pt``."""
    with torch.no_grad():
        images: torch.Tensor = denoiser.decode(sample(denoiser, scheduler, steps, generator=generators(samples)), "pt")
    return images


def pipeline_threads() -> int:
    return sum(thread.name == "pipeline" for thread in threading.enumerate())
