"""The options that every scheduler has, and how a class adds its own."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from diffusers.configuration_utils import register_to_config

from .prediction import PREDICTION_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence


class ScheduleConfig(TypedDict, total=False):
    """What the model was trained on and which times a run visits; names and defaults are diffusers'.

    Attributes:
        num_train_timesteps: training timesteps.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        trained_betas: the betas themselves.
        rescale_betas_zero_snr: rescaled to zero terminal SNR (arXiv 2305.08891).
        prediction_type: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction``.
        variance_type: ``learned`` or ``learned_range`` where the network also predicts variances, which are dropped.
        thresholding: dynamic thresholding of the predicted clean sample; for pixel models.
        dynamic_thresholding_ratio: its quantile.
        sample_max_value: upper limit of its bound. ``None``, the default, is the paper's method; diffusers' default
            of 1 turns it into a clip to [-1, 1].
        timestep_spacing: ``linspace``, ``leading`` or ``trailing``.
        steps_offset: added to ``leading`` timesteps.
        use_karras_sigmas: levels of arXiv 2206.00364, equation 5.
        use_exponential_sigmas: levels uniform in their logarithm.
        use_beta_sigmas: levels by quantiles of Beta(0.6, 0.6) (arXiv 2407.12173).
        use_lu_lambdas: levels uniform in half log-SNR (arXiv 2206.00927).
        use_flow_sigmas: rectified flow.
        flow_shift: static shift of its levels.
        use_dynamic_shifting: the shift depends on ``mu``, given to ``set_timesteps``.
        time_shift_type: ``exponential`` or ``linear`` in ``mu``.
        shift_terminal: last flow level before the end.
        base_shift: read by pipelines that compute ``mu``.
        max_shift: read by pipelines that compute ``mu``.
        base_image_seq_len: read by pipelines that compute ``mu``.
        max_image_seq_len: read by pipelines that compute ``mu``.
        sigma_min: cleanest level of a re-spacing or of EDM; the schedule's own by default.
        sigma_max: noisiest level of a re-spacing or of EDM; the schedule's own by default.
        sigma_data: selects EDM preconditioning with this standard deviation of the data.
        sigma_schedule: ``karras`` or ``exponential``, for EDM.
        rho: exponent of the Karras levels.
        final_sigmas_type: the run ends at ``zero`` or at ``sigma_min``.
        lambda_min_clipped: drops timesteps of lower half log-SNR.
        fractional_timesteps: the network gets unrounded labels; flow and EDM models always do.
        preset: ``accurate`` chooses spacing, order and ending by the number of steps.
        guidance_scale: the guidance that the preset reckons with.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: Sequence[float] | None
    rescale_betas_zero_snr: bool
    prediction_type: str
    variance_type: str | None
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float | None
    timestep_spacing: str
    steps_offset: int
    use_karras_sigmas: bool
    use_exponential_sigmas: bool
    use_beta_sigmas: bool
    use_lu_lambdas: bool
    use_flow_sigmas: bool
    flow_shift: float
    use_dynamic_shifting: bool
    time_shift_type: str
    shift_terminal: float | None
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    sigma_min: float | None
    sigma_max: float | None
    sigma_data: float | None
    sigma_schedule: str
    rho: float
    final_sigmas_type: Literal["zero", "sigma_min"]
    lambda_min_clipped: float
    fractional_timesteps: bool
    preset: str | None
    guidance_scale: float | None


DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "variance_type": None,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": None,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "sigma_min": None,
    "sigma_max": None,
    "sigma_data": None,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "fractional_timesteps": False,
    "preset": None,
    "guidance_scale": None,
}


RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""The options that choose a re-spacing; one at a time."""


def own_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a scheduler's class adds to those of ``ScheduleConfig``."""
    return {key: value for key, value in config.items() if key not in DEFAULTS and not key.startswith("_")}


def scheduler_options(**overrides: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers an ``__init__(self, *, own options, **schedule: Unpack[ScheduleConfig])`` with diffusers.

    diffusers reads a constructor's signature to know its options: the schedule's are spelled out there.

    Args:
        overrides: other defaults for schedule options.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(name, kind, default=value) for name, value in {**DEFAULTS, **overrides}.items()]
        known = [p.name for p in (*own, *shared)]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **options: Any) -> None:
            for name in options:
                if name not in known:
                    raise TypeError(unknown_option(type(self).__name__, name, known))
            init(self, *args, **options)

        checked.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        registered: Callable[..., None] = register_to_config(checked)
        return registered

    return decorate


def unknown_option(scheduler: str, name: str, known: Sequence[str]) -> str:
    """What is wrong with an option that a scheduler does not have, and the nearest that it has."""
    near = difflib.get_close_matches(name, known, 1)
    return f"{scheduler} has no option {name!r}; " + (f"did you mean {near[0]}?" if near else "see its docstring")


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "sigma_schedule": ("karras", "exponential"),
}


def check_options(config: Mapping[str, Any]) -> None:
    """Refuses values of schedule options that do not exist or contradict each other.

    Raises:
        ValueError: naming the option, its value and what to use.
    """
    for name, allowed in _CHOICES.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} {config[name]!r} is unknown; use one of {', '.join(allowed)}")
    chosen = [name for name in RESPACINGS if config[name]]
    if len(chosen) > 1:
        raise ValueError(f"only one re-spacing can be used, got {' and '.join(chosen)}; set the others to False")
    ratio, limit = config["dynamic_thresholding_ratio"], config["sample_max_value"]
    if config["thresholding"] and not 0.0 < ratio <= 1.0:
        raise ValueError(f"dynamic_thresholding_ratio {ratio} must lie in (0, 1]")
    if config["thresholding"] and limit is not None and limit < 1.0:
        raise ValueError(f"sample_max_value {limit} must be at least 1, or None for no limit")
    if config["sigma_data"] is not None and config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type {config['prediction_type']!r} has no meaning on an EDM schedule; "
            "use epsilon or v_prediction, or leave sigma_data out"
        )
