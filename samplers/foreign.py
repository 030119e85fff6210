"""What the configs of diffusers' schedulers mean: the model behind them, in the options of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PIPELINE_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""Read by pipelines that compute ``mu``; a scheduler only carries them."""

_VP_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
MODEL_KEYS = (*_VP_KEYS, "use_flow_sigmas", "sigma_data")
"""Options that say what the model was trained on; the others are the sampler's."""

_FLOW_KEYS = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal", *PIPELINE_KEYS)
_EDM_KEYS = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "prediction_type")

# By name, where no key of the config tells.
_OTHER_PROCESSES = frozenset({"FlowMapEulerDiscreteScheduler", "IPNDMScheduler", "CosineDPMSolverMultistepScheduler"})
# Keys of other processes, other outputs of the network, or other times.
_OTHER_KEYS = frozenset({"clip_denoised", "n_grid", "s_noise", "snr_shift_scale", "stages"})
_OTHER_VALUES: Mapping[str, Any] = {"invert_sigmas": True, "timestep_type": "continuous"}


def options_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a scheduler's config implies by its class, its keys and its own defaults.

    diffusers marks the defaults of the class that a config comes from and drops them when another class reads
    it. What describes the model must survive that: other classes have other defaults.

    Args:
        config: of any scheduler, from an object or from a file; or a dict of options.

    Returns:
        options that go before those of ``config``.

    Raises:
        ValueError: the model is of a kind that no sampler here can draw from.
    """
    name = config.get("_class_name")
    registered = name is not None or "_use_default_values" in config
    keys = ", ".join(key for key in config if not key.startswith("_"))
    described = str(name or f"a config with the keys {keys or '(none)'}")
    for option, value in _OTHER_VALUES.items():
        if config.get(option) == value:
            raise ValueError(f"{described} has {option}={value!r}, which no sampler here can follow; set another value")
    if name in _OTHER_PROCESSES or not _OTHER_KEYS.isdisjoint(config) or config.get("scale_factors"):
        raise ValueError(_refusal(described))
    if config.get("sigma_data") is not None:
        if registered and "rho" not in config:
            raise ValueError(_refusal(described))
        return {key: config[key] for key in _EDM_KEYS if key in config}
    if config.get("use_flow_sigmas"):
        return {key: config[key] for key in ("use_flow_sigmas", *_VP_KEYS) if key in config}
    vp = "beta_schedule" in config
    if "shift" in config and "num_train_timesteps" in config and not vp:
        given = {key: config[key] for key in _FLOW_KEYS if config.get(key) is not None}
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
        return {**flow, **given}
    if registered and not vp:
        raise ValueError(_refusal(described))
    return {key: config[key] for key in _VP_KEYS if key in config}


def _refusal(described: str) -> str:
    return (
        f"{described} describes no variance preserving, rectified flow or EDM model; "
        "give the config of a scheduler that the model can be sampled with as such"
    )
