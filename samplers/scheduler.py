"""The diffusers face of every plan: the whole scheduler contract, once."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput

from .builder import PlanBuilder
from .execute import PlanRun
from .foreign import options_from
from .fused.backend import check_backend
from .grid import Grid, make_grid
from .guided import Guidance, GuidedRun, GuidedStep
from .noise import NoiseStreams, NoiseToDraw, PhiloxStreams, draw_from
from .options import check_options, unknown_option
from .plan import Plan
from .presets import check_preset, preset_options
from .rows import GuidedOutput, Thresholding, accumulation_dtype
from .schedule import DiscreteVPSchedule, EDMSchedule, NoiseSchedule, schedule_from_config
from .timed import TimedScheduler

Floats = Sequence[float] | np.ndarray | torch.Tensor


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """What ``step`` returns.

    Attributes:
        prev_sample: the next input of the network, or the result after the last step.
        pred_original_sample: the predicted clean sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class PlanScheduler(TimedScheduler):
    """Base of all schedulers: reads the config, compiles a plan in ``set_timesteps``, executes a call in ``step``.

    A subclass names its options in ``__init__`` (decorated with ``scheduler_options``), maps foreign values and
    checks them there, calls ``_setup``, and writes its plan in ``_write``.

    ``timesteps`` has one entry a network call. All of diffusers' call styles work; ``step`` also takes lists of
    generators, and ``manual_seed`` gives noise to pipelines that hand over no generator.
    """

    _compatibles: ClassVar[list[str]] = [
        *(e.name for e in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ]
    _flow_grid: ClassVar[str] = "below_one"
    order = 1

    # ---------------------------------------------------------------- construction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A pipeline that loads a component looks for its base class in the component's own module.
        vars(sys.modules[cls.__module__]).setdefault("SchedulerMixin", SchedulerMixin)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        *,
        preset: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes the scheduler from any diffusers scheduler's config.

        Flow matching and EDM configs are recognised and become the options that say so. ``PlanScheduler`` itself makes
        the scheduler of the class that the config was saved from, so that ``PlanScheduler.from_pretrained`` loads all
        of ours.

        Args:
            config: a scheduler's ``config``, or a dict of options.
            return_unused_kwargs: also return what was not an option.
            preset: ``"accurate"`` chooses spacing, order and ending by measurement (see ``ScheduleConfig``).
            kwargs: options that override the config.

        Raises:
            ValueError: the config of a model that is neither variance preserving nor rectified flow nor EDM; or of
                ``PlanScheduler``, a config that none of ours wrote.
            TypeError: an option is misspelt; others that the class does not have are left out, as diffusers does.
        """
        if cls is PlanScheduler:
            return cls._saved_class(config).from_config(config, return_unused_kwargs, preset=preset, **kwargs)
        known = list(inspect.signature(cls).parameters)
        for name in kwargs:
            if name not in known and difflib.get_close_matches(name, known, 1, cutoff=0.8):
                raise TypeError(unknown_option(cls.__name__, name, known))
        if config is not None:
            if "theta_schedule" in config and "theta_schedule" not in inspect.signature(cls).parameters:
                raise ValueError(
                    f"config of {config.get('_class_name')} describes mean-reverting diffusion; use MRSamplerScheduler "
                    f"with solver= in the place of {cls.__name__}"
                )
            kwargs = {**options_from(config), **kwargs}
        if preset is not None:
            kwargs["preset"] = preset
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @staticmethod
    def _saved_class(config: Mapping[str, Any] | None) -> type[PlanScheduler]:
        name = (config or {}).get("_class_name")
        known: list[type[PlanScheduler]] = [PlanScheduler]
        for cls in known:
            known += cls.__subclasses__()
        found = next((cls for cls in known[1:] if cls.__name__ == name), None)
        if found is None:
            raise ValueError(
                f"config is that of {name!r}, which is no scheduler of fewstep that was imported; use a class's own "
                "from_config"
            )
        return found

    def _setup(self) -> None:
        """Checks the shared options and makes the schedule; subclasses call it at the end of ``__init__``."""
        config = self.config
        check_options(config)
        self.schedule = self._noise_schedule()
        if isinstance(self.schedule, DiscreteVPSchedule):
            self.alphas_cumprod = self.schedule.alphas_cumprod
            self.betas = 1.0 - self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        check_preset(config.preset, type(self).__name__, self.schedule.kind)
        self.init_noise_sigma = 1.0
        if isinstance(self.schedule, EDMSchedule):
            self.init_noise_sigma = math.sqrt(self.schedule.max_level**2 + 1.0)
        self.num_inference_steps: int | None = None
        levels = self.schedule.training_levels()
        self.timesteps = torch.from_numpy(self.schedule.timestep(levels[::-1])).float()
        self.sigmas = torch.from_numpy(levels).float()
        self._grid: Grid | None = None
        self._plan: Plan | None = None
        self._times: tuple[Any, ...] = ()
        self._plan_config: Any = None
        self._run: PlanRun | None = None
        self._streams: NoiseStreams | PhiloxStreams | None = None
        self._backend: str | None = None
        self._guidance: Guidance | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run_start = 0

    def _noise_schedule(self) -> NoiseSchedule:
        """What the config describes; for classes whose models are of another process."""
        return schedule_from_config(self.config)

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        """Writes the class's plan with the given options (the config, or what a preset made of it)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- times

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Floats | None = None,
        mu: float | None = None,
        timesteps: Floats | None = None,
    ) -> None:
        """Chooses the times of a run and compiles its plan.

        Args:
            num_inference_steps: number of steps; may be omitted with ``timesteps`` or ``sigmas``.
            device: where ``self.timesteps`` goes.
            sigmas: custom noise levels in the units of ``self.sigmas``, with or without the terminal one.
            mu: of dynamic shifting.
            timesteps: custom time labels.

        Raises:
            ValueError: contradicting or impossible times.
        """
        count = None if num_inference_steps is None else int(num_inference_steps)
        if count != num_inference_steps:
            raise ValueError(f"num_inference_steps must be a whole number, got {num_inference_steps}")
        labels_given, levels_given = _as_list("timesteps", timesteps), _as_list("sigmas", sigmas)
        # The same times again: the plan stays. A changed config is another object.
        times = (count, labels_given, levels_given, mu)
        if self._grid is None or self._plan is None or self._times != times or self._plan_config is not self.config:
            self._plan = None
            options = self._options(count if labels_given is None and levels_given is None else None)
            self._grid = make_grid(self.schedule, options, count, timesteps=labels_given, sigmas=levels_given, mu=mu)
            self._plan = self._compile(0)
            self._times, self._plan_config = times, self.config
        self._begin_index = self._step_index = None
        self._start_run(self._plan, 0)
        self.num_inference_steps = self._grid.steps
        labels = np.array([call.timestep for call in self._plan])
        whole = isinstance(self.schedule, DiscreteVPSchedule) and bool((labels == np.round(labels)).all())
        self._labels = labels if whole else labels.astype(np.float32)
        self.timesteps = torch.from_numpy(self._labels).to(device, torch.int64 if whole else torch.float32)
        levels = [call.level for call in self._plan] + [self._plan.final_level]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)

    @property
    def plan(self) -> Plan:
        """The compiled plan of the current times (from ``begin_index`` on, where it is set)."""
        if self._plan is None:
            raise ValueError("call set_timesteps first: it compiles the plan")
        if self._begin_index:
            return self._compile(self._begin_index)
        return self._plan

    def _options(self, steps: int | None) -> dict[str, Any]:
        options = {**self.config, "flow_grid": self._flow_grid}
        if self.config.preset is not None and steps is not None:
            chosen = preset_options(type(self).__name__, self.schedule.kind, steps, self.config.guidance_scale)
            options.update(chosen)
        self._chosen = options
        return options

    def _compile(self, first: int) -> Plan:
        """The plan from the run's call ``first`` on."""
        assert self._grid is not None
        node = 0
        if first:
            assert self._plan is not None
            node = int(np.abs(self._grid.levels[:-1] - self._plan.calls[first].level).argmin())
        name = f"{type(self).__name__}, {self._grid.steps} steps"
        builder = PlanBuilder(self._grid, self.config.prediction_type, start=node, name=name)
        plan = self._write(builder, self._chosen)
        if first and self._plan is not None:
            rest = self._plan.calls[first:]
            if [call.level for call in plan] != [call.level for call in rest]:
                raise ValueError(f"begin_index {first} lies inside a step; use the first of its {self.order} calls")
        return plan

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
        """Executes one call of the plan.

        Args:
            model_output: of the network, ``(batch, ...)``; with learned variances ``(batch, 2 C, ...)``. Or a
                ``GuidedOutput``, to have classifier-free guidance in the same pass.
            timestep: only used to find the start of a run that has no ``begin_index``.
            sample: what the network saw, ``(batch, C, ...)``, of any floating dtype.
            generator: of the noise of stochastic plans; a list gives each sample its own.
            variance_noise: the noise itself, shaped like ``sample``.
            return_dict: a ``PlanSchedulerOutput``; or else ``(prev_sample,)``, which spares the work for the predicted
                clean sample.

        Returns:
            next sample in the dtype of ``sample``, and the predicted clean sample.

        Raises:
            ValueError: no timesteps were set, the run is over, or shapes do not fit.
        """
        if self._plan is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        run = self._run
        if run is None or run.position + self._run_start != self._step_index or run.is_over:
            run = self._current_run()
        if isinstance(model_output, GuidedOutput):
            model_output = self._both_means(model_output, sample)
        elif model_output.shape != sample.shape:
            model_output = self._mean_of(model_output, sample)
        noise: torch.Tensor | NoiseToDraw | None = None
        if run.is_stochastic:
            noise = self._noise(self._step_index, sample, generator, variance_noise)
        if self._guidance is None:
            following, clean = run.step(sample, model_output, noise, clean=return_dict)
        else:
            following, clean = self._guided(self._guidance, run, sample, model_output, noise, clean=return_dict)
        self._step_index += 1
        if not return_dict:
            return (following,)
        assert clean is not None
        return PlanSchedulerOutput(prev_sample=following, pred_original_sample=clean)

    def _guided(
        self,
        guidance: Guidance,
        run: PlanRun,
        sample: torch.Tensor,
        model_output: torch.Tensor | GuidedOutput,
        noise: torch.Tensor | NoiseToDraw | None,
        *,
        clean: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``run.step`` with guidance in it."""
        if isinstance(model_output, GuidedOutput):
            model_output = model_output.combined()
        if isinstance(noise, NoiseToDraw):
            noise = noise.draw(run.position, sample.shape, accumulation_dtype(sample.dtype))
        if run.position == 0:
            guidance.start(GuidedRun(run.plan, sample))
        step = GuidedStep(run, sample, model_output, noise)
        guidance.act(step)
        following, predicted = step.apply(clean=clean)
        ancestors = guidance.finish(following) if run.is_over else None
        if ancestors is not None:
            following = following.index_select(0, ancestors)
            predicted = None if predicted is None else predicted.index_select(0, ancestors)
        return following, predicted

    def guide(self, guidance: Guidance | None) -> PlanScheduler:
        """Gives the runs of this scheduler guidance: rewards, particles, corrections; ``None`` takes it away.

        It is no part of the config: another scheduler made from this one's config has none.

        Args:
            guidance: one of ``fewstep.guidance``, or of one's own.

        Returns:
            itself.

        Raises:
            ValueError: no guidance, or a sampler whose samples are not what the network and rewards see.
        """
        if guidance is not None and not isinstance(guidance, Guidance):
            raise ValueError(f"guidance {guidance!r} is no Guidance; make one of the classes of fewstep.guidance")
        if guidance is not None and "theta_schedule" in self.config:
            raise ValueError(
                f"guidance cannot act in {type(self).__name__}, which steps residuals in the place of images; rank its "
                "results by the reward instead"
            )
        self._guidance = guidance
        return self

    def _current_run(self) -> PlanRun:
        """The run that stands at ``step_index``: the one under way, taken back by one step, or a new one."""
        index = self._step_index
        assert index is not None
        assert self._plan is not None
        if index >= len(self._plan):
            raise ValueError(f"the run is over after {len(self._plan)} steps; call set_timesteps for another one")
        if self._run is not None:
            position = self._run_start + self._run.position
            if index == position - 1:
                if self._guidance is not None:
                    raise ValueError(
                        f"step {index} was taken back, which its guidance cannot follow; guide(None) first, or begin "
                        "anew with set_timesteps"
                    )
                self._run.undo()
                return self._run
            if index == position:
                return self._run
        return self._start_run(self._plan if index == 0 else self._compile(index), index)

    def _start_run(self, plan: Plan, index: int) -> PlanRun:
        threshold = None
        if self.config.thresholding:
            threshold = Thresholding(self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        run, made = self._run, (threshold, check_backend(self._backend))
        if run is not None and run.plan is plan and (run.thresholding, run.backend) == made:
            self._run = run.again()
        else:
            self._run = PlanRun(plan, threshold, backend=self._backend)
        self._run_start = index
        return self._run

    def _mean_of(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The first half of the channels of a network that also predicts variances."""
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned and model_output.shape[1] == 2 * sample.shape[1]:
            return model_output[:, : sample.shape[1]]
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)} and sample {tuple(sample.shape)}; they must be equal"
            + ("" if learned else ', or set variance_type="learned_range" for a network that predicts variances')
        )

    def _both_means(self, output: GuidedOutput, sample: torch.Tensor) -> GuidedOutput:
        """Both outputs in the shape of the sample."""
        first, second = (v if v.shape == sample.shape else self._mean_of(v, sample) for v in output[:2])
        return GuidedOutput(first, second, output.scale)

    def noises(
        self, sample: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> list[torch.Tensor | NoiseToDraw]:
        """The noise of a whole run: that of each call that reads noise, in order, as ``step`` would draw it.

        Args:
            sample: of the run's shape, dtype and device.
            generator: as of ``step``.
        """
        first = self._begin_index or 0
        self._run_start = first
        return [
            self._noise(first + k, sample, generator, None) for k, call in enumerate(self.plan) if call.is_stochastic
        ]

    def _noise(
        self,
        index: int,
        sample: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor | NoiseToDraw:
        dtype = accumulation_dtype(sample.dtype)
        if variance_noise is not None:
            return variance_noise.to(sample.device, dtype)
        if generator is None and self._streams is not None:
            if isinstance(self._streams, PhiloxStreams):
                return self._streams.at(len(sample), sample.device, self._run_start)
            return self._streams.draw(index, sample.shape, sample.device, dtype)
        return draw_from(generator, sample.shape, sample.device, dtype)

    def manual_seed(self, seeds: int | Sequence[int] | None, *, in_kernel: bool = False) -> PlanScheduler:
        """Seeds the noise of stochastic plans, for pipelines that hand no generator to ``step`` (SD3, Flux, DiT).

        Args:
            seeds: one a sample; or the first sample's, sample ``k`` then has ``seeds + k``; ``None`` takes it back.
            in_kernel: draws with Philox, which CUDA does inside the step, without memory and transfers. These are other
                numbers than without, and the same on every device.

        Returns:
            itself.
        """
        streams = PhiloxStreams if in_kernel else NoiseStreams
        self._streams = None if seeds is None else streams(seeds)
        return self

    def set_backend(self, backend: str | None) -> PlanScheduler:
        """Chooses what executes the steps of the runs that begin after it; it is no part of the config.

        Args:
            backend: ``"torch"``; ``"triton"``; ``"compile"`` for one loop a step by ``torch.compile``, which takes
                seconds the first time and pays on the CPU from some 100,000 elements on; or ``None`` for what
                ``FEWSTEP_BACKEND`` says, or else Triton on CUDA, and torch elsewhere.

        Returns:
            itself.

        Raises:
            ValueError: another one.
        """
        self._backend = check_backend(backend)
        return self

    @property
    def backend(self) -> str | None:
        """What ``set_backend`` chose."""
        return self._backend

    @property
    def is_plain(self) -> bool:
        """Whether a step does what the plan says and nothing more."""
        own = type(self).step is not PlanScheduler.step or "theta_schedule" in self.config
        return not own and self._guidance is None


def _as_list(name: str, values: Floats | None) -> list[float] | None:
    if values is None:
        return None
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be a list of at least one number, got {values!r}")
    numbers: list[float] = array.tolist()
    return numbers
