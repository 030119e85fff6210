"""The MR Sampler (arXiv 2502.07856): samplers of variance preserving models on mean-reverting diffusion.

Half log-SNR moves by the same steps in the residual ``y = (x - mu) / sigma_inf`` as in ``x``, so the update formulas of
the paper are those of (SDE-)DPM-Solver(++) on ``y``, written out in ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .builder import PlanBuilder
from .mean_reverting import MeanRevertingSchedule
from .options import DEFAULTS, ScheduleConfig, own_options, scheduler_options
from .plan import Plan
from .registry import SAMPLERS
from .rows import GuidedOutput, accumulation_dtype
from .schedule import NoiseSchedule
from .scheduler import PlanScheduler, PlanSchedulerOutput
from .time_shift import TimeShiftScheduler
from .trajectory import Network

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
# Options of other processes. Thresholds bound the clean image around 0, and here the solver sees its residual.
_FOREIGN = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "flow_shift",
    "shift_terminal",
    "sigma_data",
    "thresholding",
    "lambda_min_clipped",
)


class MRSamplerScheduler(PlanScheduler):
    """The MR Sampler (arXiv 2502.07856), and any other sampler, for models of mean-reverting diffusion.

    The condition image ``mu``, the degraded one, is given once a batch; a run begins at ``mu`` plus noise:

        scheduler.set_timesteps(10)
        scheduler.set_condition(mu)
        x = scheduler.prior_sample(torch.randn_like(mu))
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, mu, t), t, x).prev_sample

    The paper's forms are ``solver="dpm++-heun"`` with these ``solver_options``: ``solver_order`` 1 to 3, and for
    ``algorithm_type`` ``dpmsolver++`` (ODE-d), ``dpmsolver`` (ODE-n), ``sde-dpmsolver++`` (SDE-d) or ``sde-dpmsolver``
    (SDE-n). The third order carries the full second derivative; the paper's code halves it and converges with order 2
    (``{"diffusers_third_order": True}`` reproduces that for the ODE). ``use_lu_lambdas`` is its ``linear-lambda`` grid.

    ``sigmas``, ``plan`` and the level of ``add_noise`` are those of the residual ``(x - mu) / sigma_inf``; samples,
    network outputs, clean predictions and velocities are in the units of the images.

    Args:
        solver: the name of a registered sampler.
        solver_options: other values of its own options.
        theta_schedule: ``constant``, ``linear`` or ``cosine``.
        sigma_inf: standard deviation of the noise at the end of the forward process, in units of images in [0, 1];
            published models use 10/255 to 75/255 (``max_sigma`` in their configs).
        final_alpha: ``alpha`` at the last timestep (``eps`` in their configs).
        mr_sampler_tables: see ``MeanRevertingSchedule``; together with ``final_sigmas_type="sigma_min"`` the released
            code's run, which ends at ``sigma = 0.011 sigma_inf`` (cosine) rather than at the clean image.
        schedule: options of ``ScheduleConfig``; ``num_train_timesteps`` is the label of the noisiest level, and labels
            may be fractions.

    Raises:
        ValueError: unknown options, or options of another process.
    """

    # Their configs do not say what this process is.
    _compatibles: ClassVar[list[str]] = []

    @scheduler_options(num_train_timesteps=100, fractional_timesteps=True)
    def __init__(
        self,
        *,
        solver: str = "dpm++-heun",
        solver_options: Mapping[str, Any] | None = None,
        theta_schedule: str = "cosine",
        sigma_inf: float = 50 / 255,
        final_alpha: float = 0.005,
        mr_sampler_tables: bool = False,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        for name in _FOREIGN:
            if self.config[name] != DEFAULTS[name]:
                raise ValueError(
                    f"{name} {self.config[name]!r:.50} has no meaning in mean-reverting diffusion; leave it out "
                    "(theta_schedule and sigma_inf describe the model)"
                )
        if self.config.prediction_type not in _PREDICTIONS:
            raise ValueError(
                f"prediction_type {self.config.prediction_type!r} has no meaning in mean-reverting diffusion; "
                f"use one of {', '.join(_PREDICTIONS)}"
            )
        if not 0.0 < sigma_inf < math.inf:
            raise ValueError(f"sigma_inf {sigma_inf} must be positive; trained models use 10/255 to 75/255")
        self._setup()
        alphas_cumprod = self.schedule.alpha_sigma(self.schedule.training_levels())[0] ** 2
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod).float()
        self.betas = torch.from_numpy(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])).float()
        self._condition: torch.Tensor | None = None
        self._base = self._solver(solver, solver_options)
        self.order = self._base.order
        self.init_noise_sigma = sigma_inf

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        *,
        preset: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes the scheduler from the config of another one of this class, or from a dict of its options.

        See ``PlanScheduler.from_config``.

        Raises:
            ValueError: the config of a scheduler of another class.
        """
        config = {} if config is None else config
        if ("_class_name" in config or "_use_default_values" in config) and "theta_schedule" not in config:
            raise ValueError(
                f"config of {config.get('_class_name', 'another scheduler')} describes no mean-reverting "
                "diffusion; make the scheduler from theta_schedule, sigma_inf and num_train_timesteps of the model"
            )
        return super().from_config(config, return_unused_kwargs, preset=preset, **kwargs)

    def _solver(self, name: str, options: Mapping[str, Any] | None) -> PlanScheduler:
        """The solver's own scheduler, which checks and completes its options."""
        if name not in SAMPLERS:
            raise ValueError(f"solver {name!r} is unknown; use one of {', '.join(SAMPLERS)}")
        solver = SAMPLERS[name].within(self.config, options)
        shifts = isinstance(solver, TimeShiftScheduler) and solver.config.window >= 2
        if shifts and solver.config.cutoff < self.config.num_train_timesteps:
            raise ValueError(
                f"cutoff {solver.config.cutoff:g} of solver {name!r} would shift times by the residual's variance, "
                f"which is that of noise throughout; give at least {self.config.num_train_timesteps}, or use its solver"
            )
        return solver

    def _noise_schedule(self) -> NoiseSchedule:
        config = self.config
        return MeanRevertingSchedule(
            config.theta_schedule,
            config.num_train_timesteps,
            config.final_alpha,
            mr_sampler_tables=config.mr_sampler_tables,
        )

    def _options(self, steps: int | None) -> dict[str, Any]:
        options = super()._options(steps)
        options.update(own_options(self._base.config), flow_grid=self._base._flow_grid)
        return options

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return self._base._write(plan, options)

    # ---------------------------------------------------------------- the condition image

    def set_condition(self, mu: torch.Tensor) -> MRSamplerScheduler:
        """Gives the degraded images towards which the forward process reverts.

        Args:
            mu: ``(batch, C, ...)``, shaped and scaled like the samples (usually [0, 1]).

        Returns:
            itself.

        Raises:
            ValueError: no tensor of floating dtype.
        """
        if not isinstance(mu, torch.Tensor) or not mu.is_floating_point():
            kind = f"a tensor of {mu.dtype}" if isinstance(mu, torch.Tensor) else type(mu).__name__
            raise ValueError(f"mu is {kind}; pass a floating point tensor shaped like the samples, scaled to [0, 1]")
        self._condition = mu
        return self

    def prior_sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The sample that a run begins with, ``mu + sigma_inf noise``.

        Args:
            noise: standard normal, shaped like ``mu``.
        """
        return self._restored(noise, noise)

    def _mu(self, like: torch.Tensor) -> torch.Tensor:
        mu = self._condition
        if mu is None:
            raise ValueError("mu is missing: give the degraded images with set_condition(mu) before the run")
        if mu.shape != like.shape:
            raise ValueError(
                f"mu has shape {tuple(mu.shape)} and the sample {tuple(like.shape)}; "
                "give one condition image a sample with set_condition, of the sample's shape"
            )
        # Moved once, not at every step.
        self._condition = mu = mu.to(like.device, accumulation_dtype(like.dtype))
        return mu

    def _residual(self, image: torch.Tensor) -> torch.Tensor:
        mu = self._mu(image)
        return (image.to(mu.dtype) - mu) / self.config.sigma_inf

    def _residual_output(self, model_output: torch.Tensor) -> torch.Tensor:
        """What a network of the same prediction type says about the residual."""
        if self.config.prediction_type == "sample":
            return self._residual(model_output)
        if self.config.prediction_type == "v_prediction":
            return model_output.to(accumulation_dtype(model_output.dtype)) / self.config.sigma_inf
        return model_output

    def on_residual(self, network: Network) -> tuple[PlanScheduler, Network]:
        """The solver and a network as those of a variance preserving model, with the times and the condition set here.

        It is what ``fine_trajectory`` and ``search_ratios`` work on: ``search_ratios(*scheduler.on_residual(network),
        noise)``, with one noise a condition image.

        Args:
            network: of images, ``network(x, timestep)``; it knows its condition.

        Returns:
            the solver's scheduler with its timesteps set, and the network of residuals.

        Raises:
            ValueError: no timesteps were set.
        """
        if self._plan is None:
            raise ValueError("the scheduler has no timesteps; call its set_timesteps first")

        def on_residual(residual: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self._residual_output(network(self._restored(residual, residual), timestep))

        count, labels, levels, _ = self._times
        self._base.schedule = self.schedule
        self._base.set_timesteps(count, sigmas=levels, timesteps=labels)
        return self._base, on_residual

    def _restored(self, residual: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.add(self._mu(like), residual, alpha=self.config.sigma_inf).to(like.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``alpha x_0 + (1 - alpha) mu + sigma noise`` at the timesteps, with the current condition.

        See ``PlanScheduler.add_noise`` for which levels these are.
        """
        residual = self._residual(original_samples)
        return self._restored(super().add_noise(residual, noise, timesteps), original_samples)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity target ``alpha sigma_inf noise - sqrt(1 - alpha^2) (x_0 - mu)``."""
        velocity = super().get_velocity(self._residual(sample), noise, timesteps)
        return (velocity * self.config.sigma_inf).to(sample.dtype)

    # ---------------------------------------------------------------- a step

    def step(
        self,
        model_output: torch.Tensor | GuidedOutput,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[torch.Tensor]:
        """Executes one call of the plan on the residual.

        Args:
            model_output: of the network: the noise, the clean image, or the velocity ``alpha sigma_inf eps -
                sqrt(1 - alpha^2) (x_0 - mu)``.
            timestep: see ``PlanScheduler.step``.
            sample: what the network saw, shaped like the condition.
            generator: of the noise of stochastic plans; a list gives each sample its own.
            variance_noise: the noise itself, standard normal.
            return_dict: see ``PlanScheduler.step``.

        Returns:
            next sample in the dtype of ``sample``, and the predicted clean image.

        Raises:
            ValueError: no condition was set or it has another shape; and as ``PlanScheduler.step``.
        """
        if isinstance(model_output, GuidedOutput):
            model_output = model_output.combined()
        residual = self._residual(sample)
        if model_output.shape != sample.shape:
            model_output = self._mean_of(model_output, sample)
        result = super().step(
            self._residual_output(model_output), timestep, residual, generator, variance_noise, return_dict
        )
        if isinstance(result, tuple):
            return (self._restored(result[0], sample),)
        return PlanSchedulerOutput(
            prev_sample=self._restored(result.prev_sample, sample),
            pred_original_sample=self._restored(result.pred_original_sample, sample),
        )
