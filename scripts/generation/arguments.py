"""The arguments of a pipeline's call for some images of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .inputs import open_input
from .model import Model
from .record import Settings


def pipeline_inputs(settings: Settings, model: Model, indices: Sequence[int]) -> dict[str, Any]:
    """What a pipeline is told about some images, beside their number, steps and generators.

    Args:
        settings: checked settings.
        model: the model they name.
        indices: which images.
    """
    conditions = [settings.condition_of(i) for i in indices]
    inputs: dict[str, Any] = {}
    if model.kind == "text":
        inputs["prompt"] = conditions
    elif model.kind == "class":
        inputs["class_labels"] = conditions
    elif model.kind == "restoration":
        channels = model.pipeline.unet.config.out_channels
        inputs["image"] = [open_input(str(name), channels) for name in conditions]
    if settings.negative_prompt is not None:
        inputs["negative_prompt"] = [settings.negative_prompt] * len(indices)
    for name in ("guidance_scale", "height", "width"):
        if getattr(settings, name) is not None:
            inputs[name] = getattr(settings, name)
    return inputs
