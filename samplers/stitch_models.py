"""What the networks of a stitched denoiser must share, and how a pipeline addresses them."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import ConfigMixin, ModelMixin

from .prediction import PREDICTION_TYPES
from .schedule import EDMSchedule, NoiseSchedule, schedule_from_config
from .unipc import UniPCScheduler

_UNIT, _RISING = (1.0, 0.0), (0.0, 1.0)
_TIMESTEP_RANGES: Mapping[str, tuple[float, float]] = {
    "ChromaTransformer2DModel": _UNIT,
    "Flux2Transformer2DModel": _UNIT,
    "FluxTransformer2DModel": _UNIT,
    "Krea2Transformer2DModel": _UNIT,
    "LongCatImageTransformer2DModel": _UNIT,
    "Lumina2Transformer2DModel": _RISING,
    "LuminaNextDiT2DModel": _RISING,
    "NucleusMoEImageTransformer2DModel": _UNIT,
    "OvisImageTransformer2DModel": _UNIT,
    "PRXTransformer2DModel": _UNIT,
    "QwenImage21Transformer2DModel": _UNIT,
    "QwenImageTransformer2DModel": _UNIT,
    "ZImageTransformer2DModel": _RISING,
}
"""Labels of pure noise and of clean data, for the networks whose pipelines do not hand over 1000 to 0."""

# Keys of configs that say which latents and which conditioning the pipeline must hand over.
_SHARED = (
    "in_channels",
    "num_embeds_ada_norm",
    "num_class_embeds",
    "class_embed_type",
    "projection_class_embeddings_input_dim",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_cond_proj_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "caption_channels",
    "cap_feat_dim",
    "use_additional_conditions",
    "text_dim",
    "text_embed_dim",
    "image_dim",
    "added_kv_proj_dim",
)
BLOCKS = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
)
"""Keys of configs that shape the residuals of a ControlNet or an adapter."""
RESIDUALS = (
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)
"""Arguments that bring those residuals."""


def check_models(models: Sequence[Any]) -> None:
    """Refuses networks that a pipeline could not call in turn.

    Raises:
        ValueError: fewer than two, no networks of diffusers, or other latents, conditioning or dtypes.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries; give two or more networks, the noisiest part's first")
    for k, model in enumerate(models):
        if not isinstance(model, ModelMixin) or not isinstance(model, ConfigMixin):
            raise ValueError(f"models[{k}] is a {type(model).__name__}; give networks of diffusers (ModelMixin)")
    shared = list(_SHARED)
    if all("patch_size" in model.config for model in models):
        shared.append("sample_size")  # their position embeddings belong to a size; a U-Net takes any
    for key in shared:
        values = [model.config[key] for model in models if key in model.config]
        if not all_equal(values):
            raise ValueError(
                f"models differ in {key} ({', '.join(map(repr, values))}), so a pipeline cannot hand all of them the "
                "same latents and conditioning; use models of one latent space that take the same conditioning"
            )
    dtypes = [model.dtype for model in models]
    if not all_equal(dtypes):
        raise ValueError(f"models differ in dtype ({', '.join(map(str, dtypes))}); load or cast them to one dtype")


def common_channels(models: Sequence[Any]) -> int | None:
    """Channels that all outputs are cut to, ``None`` where they agree.

    Raises:
        ValueError: they differ by something else than a learned variance.
    """
    channels = [model.config["out_channels"] for model in models if "out_channels" in model.config]
    if len(channels) < len(models) or all_equal(channels):
        return None
    counts = [c or model.config["in_channels"] for c, model in zip(channels, models, strict=True)]
    fewest: int = min(counts)
    if not set(counts) <= {fewest, 2 * fewest}:
        raise ValueError(
            f"models differ in out_channels ({', '.join(map(str, counts))}), by more than a learned variance; use "
            "models of one latent space"
        )
    return None if all_equal(counts) else fewest


def checked_fractions(fractions: Sequence[float], count: int) -> list[float]:
    """The fractions as numbers.

    Raises:
        ValueError: not one a model, or they do not sum to 1.
    """
    shares = [float(share) for share in fractions]
    if len(shares) != count:
        raise ValueError(f"fractions has {len(shares)} entries and models {count}; give one a model")
    if not all(0.0 <= share <= 1.0 for share in shares) or abs(math.fsum(shares) - 1.0) > 1e-6:
        raise ValueError(f"fractions={shares} must be at least 0 and sum to 1, such as [0.4, 0.6]")
    return shares


def default_range(models: Sequence[Any]) -> tuple[float, float]:
    """The time labels of pure noise and of clean data that the pipelines of these classes hand over.

    Raises:
        ValueError: the models' conventions differ.
    """
    ranges = [_TIMESTEP_RANGES.get(type(model).__name__, (1000.0, 0.0)) for model in models]
    if not all_equal(ranges):
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(f"models of classes {names} are given different time labels; use models of one convention")
    return ranges[0]


def checked_range(timestep_range: Sequence[float]) -> tuple[float, float]:
    """The range as two numbers.

    Raises:
        ValueError: it is none.
    """
    values = [float(value) for value in timestep_range]
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] == values[1]:
        raise ValueError(f"timestep_range={values}: give the labels of pure noise and of clean data, such as (1000, 0)")
    return values[0], values[1]


def checked_predictions(config: Mapping[str, Any], count: int) -> NoiseSchedule:
    """The schedule over which the prediction types are converted.

    Args:
        config: of the stitched denoiser.
        count: of models.

    Raises:
        ValueError: unknown types, no schedule, or one without conversions.
    """
    kinds = config["prediction_types"]
    if len(kinds) != count or not set(kinds) <= set(PREDICTION_TYPES):
        raise ValueError(f"prediction_types={kinds}: give one of {', '.join(PREDICTION_TYPES)} for each of the models")
    if config["noise_schedule"] is None:
        raise ValueError("prediction_types needs noise_schedule: give pipe.scheduler.config of the models")
    schedule = schedule_from_config(config["noise_schedule"])
    if isinstance(schedule, EDMSchedule):
        raise ValueError("noise_schedule is EDM, whose networks share one preconditioning; leave out prediction_types")
    return schedule


def schedule_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's config describes the noise schedule."""
    known = UniPCScheduler.from_config(config).config
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "use_flow_sigmas")
    return {key: known[key] for key in (*keys, "rescale_betas_zero_snr", "sigma_data", "sigma_min", "sigma_max")}


def data_pair(pair: tuple[float, float] | None, kind: str, alpha: float) -> tuple[float, float]:
    """The pair of a conversion to the data prediction.

    Raises:
        ValueError: it has no meaning at this ``alpha``.
    """
    if pair is None:
        raise ValueError(f"a {kind} prediction says nothing where alpha={alpha:g}; give that model no such timestep")
    return pair


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler whose steps cannot be counted.

    Raises:
        ValueError: it has no ``step_index``.
    """
    if not all(hasattr(scheduler, name) for name in ("step_index", "begin_index", "timesteps", "order")):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} keeps no step_index, by which steps are counted; use a scheduler of "
            'fewstep.samplers, or by="timestep"'
        )


def label_name(model: Any, parameters: Sequence[inspect.Parameter]) -> str:
    """The name of the time label among the parameters of a network's ``forward``.

    Raises:
        ValueError: there is none.
    """
    names = [parameter.name for parameter in parameters]
    for name in ("timestep", "t"):
        if name in names[1:]:
            return name
    raise ValueError(f"{type(model).__name__} takes no timestep, which decides whose turn it is; use a denoiser")


def address(model: Any) -> list[str]:
    """Library and class as in a ``model_index.json``."""
    cls = type(model)
    return ["diffusers" if cls.__module__.split(".")[0] == "diffusers" else cls.__module__, cls.__name__]


def class_of(library: str, name: str) -> Any:
    """The class at an `address`.

    Raises:
        ValueError: its module was not imported, or it is no network.
    """
    # As in diffusers: a file may name a module, but never have it run.
    found = getattr(diffusers if library == "diffusers" else sys.modules.get(library), name, None)
    if not (inspect.isclass(found) and issubclass(found, ModelMixin)):
        raise ValueError(f"{library}.{name} is no network that is loaded; import {library} before from_pretrained")
    return found


def all_equal(values: Sequence[Any]) -> bool:
    """Whether all are the same; a list from a file and a tuple from code are."""
    plain = [list(value) if isinstance(value, tuple) else value for value in values]
    return all(one == other for one, other in itertools.pairwise(plain))
