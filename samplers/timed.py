"""Where a run of a scheduler stands, and what noise is there."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin

from .plan import Plan
from .schedule import EDMSchedule, FlowSchedule, NoiseSchedule


class TimedScheduler(SchedulerMixin, ConfigMixin):
    """The part of diffusers' contract that asks for times and noise levels, over the schedule and the plan of a run.

    Attributes:
        schedule: of the training process.
        timesteps: labels of a run, one a network call.
        sigmas: the noise levels there, and that of the result.
    """

    schedule: NoiseSchedule
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    _plan: Plan | None
    _labels: np.ndarray
    _step_index: int | None
    _begin_index: int | None

    @property
    def step_index(self) -> int | None:
        """Index of the next call, ``None`` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first call, ``None`` if it was not set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the run at a later entry of ``timesteps`` (image to image); the plan is compiled from there.

        Raises:
            ValueError: no entry of ``timesteps`` has this index.
        """
        if self._plan is not None and not 0 <= begin_index < len(self._plan):
            raise ValueError(f"begin_index {begin_index} must lie in 0 to {len(self._plan) - 1}; more steps leave some")
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The first entry of ``timesteps`` with this label.

        Raises:
            ValueError: there is none.
        """
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        labels = self._labels if schedule_timesteps is None else schedule_timesteps.cpu().numpy()
        distance = np.abs(labels - value)
        index = int(distance.argmin())
        if distance[index] > 1e-3 * max(1.0, abs(value)):
            raise ValueError(f"timestep {value:g} is not among the run's timesteps {[float(t) for t in labels]}")
        return index

    def _first_index(self, timestep: float | torch.Tensor) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            # Reading it would wait for the device; where an entry of ours lies says which one it is.
            own = self.timesteps.untyped_storage().data_ptr()
            if timestep.device == self.timesteps.device and timestep.untyped_storage().data_ptr() == own:
                return int(timestep.storage_offset())
        return self.index_for_timestep(timestep)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The network's input: the sample itself, or for EDM models the sample times ``c_in``."""
        if not isinstance(self.schedule, EDMSchedule):
            return sample
        if self._plan is None or timestep is None:
            raise ValueError("scale_model_input of an EDM model needs set_timesteps before it, and the timestep")
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        return sample * self._plan.calls[self._step_index].in_scale

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``alpha x_0 + sigma noise`` at the timesteps.

        During a run that has a ``begin_index`` it is the level of the next step (image to image, inpainting).
        Otherwise each timestep is looked up in the run, and where it is not part of it, in the schedule.
        """
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``add_noise`` with the argument order of flow pipelines."""
        if noise is None:
            raise ValueError("scale_noise needs noise; pass a tensor shaped like sample")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity target: ``alpha noise - sigma x_0``, for flow models ``noise - x_0``."""
        if isinstance(self.schedule, FlowSchedule):
            return noise - sample
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def _alpha_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._plan is not None and self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            levels = self.sigmas[min(index, len(self.sigmas) - 1)].expand(len(timesteps)).double().numpy()
        else:
            labels = timesteps.detach().cpu().double().numpy()
            levels = self.schedule.level(labels)
            if self._plan is not None:
                planned = {float(label): call.level for label, call in zip(self._labels, self._plan, strict=True)}
                levels = np.array([planned.get(float(t), float(s)) for t, s in zip(labels, levels, strict=True)])
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (
            torch.from_numpy(np.asarray(v)).to(like.device, like.dtype).view(shape)
            for v in self.schedule.alpha_sigma(levels)
        )
        return alpha, sigma

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps
