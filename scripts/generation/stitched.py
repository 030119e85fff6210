"""Two loaded models as one: the first makes the early steps, the second the rest."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from fewstep.samplers import StitchedDenoiser

from .model import Model, load_model, resolve_name
from .record import Settings

_NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "shift"),
    *("theta_schedule", "sigma_inf", "final_alpha"),
)


def resolved_stitch(text: str) -> str:
    """``"MODEL:SHARE"`` as it is stored in a record.

    Raises:
        ValueError: something else, or no such model.
    """
    name, share = _parts(text)
    return f"{resolve_name(name)}:{share}"


def load_stitched(settings: Settings) -> Model:
    """The model of a run; with ``settings.stitch`` another model's network makes the first steps of every image.

    Raises:
        ValueError: a model cannot be loaded, or the two cannot stand in for each other.
    """
    model = load_model(settings.model, settings.dtype, settings.device)
    if settings.stitch is None:
        return model
    name, share = _parts(settings.stitch)
    early = load_model(name, settings.dtype, settings.device).pipeline
    check_interchangeable(early, model.pipeline, name, model.name)
    part = "transformer" if "transformer" in model.pipeline.components else "unet"
    networks = [getattr(early, part), getattr(model.pipeline, part)]
    stitched = StitchedDenoiser(networks, [share, 1.0 - share], by="step").follow(model.pipeline)
    setattr(model.pipeline, part, stitched)
    return model


def _parts(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition(":")
    try:
        fraction = float(share)
    except ValueError:
        fraction = -1.0
    if not name or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"stitch {text!r} is not MODEL:SHARE with a share from 0 to 1, such as digits-small:0.4")
    return name, fraction


def check_interchangeable(early: DiffusionPipeline, late: DiffusionPipeline, early_name: str, late_name: str) -> None:
    """Refuses pipelines whose networks cannot stand in for each other, so far as their other parts tell.

    Raises:
        ValueError: another kind of pipeline, autoencoder, text encoder or noise schedule.
    """
    title = f"models {early_name!r} and {late_name!r}"
    if type(early) is not type(late):
        kinds = f"{type(early).__name__} and {type(late).__name__}"
        raise ValueError(f"{title} are of different kinds ({kinds}); give models of one kind")
    for part, theirs in late.components.items():
        if (
            part not in ("transformer", "unet")
            and isinstance(theirs, torch.nn.Module)
            and not _same_weights(early.components[part], theirs)
        ):
            raise ValueError(f"{title} have a different {part}; give models of one latent space and one conditioning")
    for key in _NOISE:
        values = [pipeline.scheduler.config.get(key) for pipeline in (early, late)]
        if values[0] != values[1]:
            raise ValueError(
                f"{title} differ in {key} ({values[0]!r}, {values[1]!r}); give models of one noise schedule"
            )


def _same_weights(one: Any, other: torch.nn.Module) -> bool:
    if not isinstance(one, torch.nn.Module):
        return False
    scales = [getattr(module.config, "scaling_factor", None) for module in (one, other)]
    ours, theirs = one.state_dict(), other.state_dict()
    return (
        scales[0] == scales[1]
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )
