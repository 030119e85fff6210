"""The network of a loaded model as a function of sample and timestep, for searches that run their own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTPipeline

from ..training.diffusion import NULL_LABEL
from .model import Model


def guided_network(
    model: Model, labels: torch.Tensor, guidance_scale: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``network(sample, timestep)`` with classifier-free guidance, as the model's pipeline combines the branches.

    Args:
        model: a class-conditional DiT whose network predicts no variances.
        labels: one a sample.
        guidance_scale: 1 is none.

    Raises:
        ValueError: another kind of model.
    """
    network = _transformer(model)
    labels = labels.to(network.device)
    unlabelled = torch.full_like(labels, NULL_LABEL)

    def branch(sample: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        times = timestep.to(sample.device).expand(len(sample))
        prediction: torch.Tensor = network(sample, times, classes).sample
        return prediction

    @torch.no_grad()
    def guided(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional = branch(sample, timestep, labels)
        if guidance_scale == 1.0:
            return conditional
        return torch.lerp(branch(sample, timestep, unlabelled), conditional, guidance_scale)

    return guided


def latent_shape(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of what the network sees.

    Raises:
        ValueError: as for ``guided_network``.
    """
    config = _transformer(model).config
    return config.in_channels, config.sample_size, config.sample_size


def _transformer(model: Model) -> Any:
    pipeline = model.pipeline
    if isinstance(pipeline, DiTPipeline):
        config = pipeline.transformer.config
        if config.out_channels == config.in_channels:
            return pipeline.transformer
    raise ValueError(
        f"model {model.name!r} is a {type(pipeline).__name__}; what can be driven here is a DiTPipeline "
        "whose network predicts no variances"
    )
