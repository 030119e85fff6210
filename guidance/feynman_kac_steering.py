"""Sequential Monte Carlo over the particles of a sampler: Feynman-Kac steering."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep

from .populations import Population, warn_without_noise
from .potentials import Potential


class FeynmanKacSteering(Guidance):
    """Particles that are weighed by potentials and resampled (arXiv 2501.06848, 2503.02819).

    ``scheduler.guide(FeynmanKacSteering([RewardTilt(reward, 2.0)], particles=8))``, then the pipeline with
    ``num_images_per_prompt=8``: each prompt's images are one population, and groups never mix. The scheduler must draw
    noise (``sde-dpm++``), or copies never part.

    Particles are weighed and resampled when the network has just been evaluated at them and before they move: no call
    is wasted, and copies part in the same step. All that the sampler keeps of a particle goes with it.

    A pipeline that doubles its batch for guidance (DiT) makes twice the groups; the first half counts.

    Args:
        potentials: factors of the weights.
        particles: of each group: the pipeline's ``num_images_per_prompt``.
        resampling: ``systematic``, ``stratified``, ``residual`` or ``multinomial``.
        threshold: a group resamples when its effective sample size is below this share of ``particles``; 1 resamples
            whenever weights differ, 0 only at the end.
        every: particles may resample, and rewards are asked, in every so many network calls.
        start: share of the calls after which the potentials act; rewards of noisy predictions say little before 0.2.
        stop: share of the calls after which they rest.
        finish: ``resample`` returns particles of equal weights; ``weights`` returns them with those in
            ``population.log_weights``.
        seeds: of the resampling: of group 0 (group ``k`` then has ``seeds + k``), or one a group; ``None`` draws one
            from torch's global state. With it and the scheduler's ``manual_seed``, a group's result does not depend on
            what else is in the batch.

    Attributes:
        population: weights, evidence, ancestry and effective sample sizes of the run.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        potentials: Sequence[Potential],
        *,
        particles: int,
        resampling: str = "systematic",
        threshold: float = 0.5,
        every: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        finish: str = "resample",
        seeds: int | Sequence[int] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every} must be at least 1; threshold=0 resamples at the end only")
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(f"start {start} and stop {stop} must be shares of the run, 0 <= start < stop <= 1")
        if finish not in ("resample", "weights"):
            raise ValueError(f"finish {finish!r} is unknown; use resample or weights")
        self.potentials = list(potentials)
        self.population = Population(particles, resampling=resampling, threshold=threshold, seeds=seeds)
        self.every, self._interval, self._finish = every, (start, stop), finish

    def start(self, run: GuidedRun) -> None:
        if self.population.particles > 1 and self.population.threshold > 0.0:
            warn_without_noise(run, "resampled particles")
        self.population.start(len(run.sample), run.sample)
        self._calls = len(run.plan)
        first, last = (round(share * self._calls) for share in self._interval)
        self._active = range(first, last)
        for potential in self.potentials:
            potential.start(run)

    def act(self, step: GuidedStep) -> None:
        active = step.index in self._active
        turn = active and (step.index - self._active.start) % self.every == 0
        for potential in self.potentials:
            self._weigh(potential.weigh(step, active=active, turn=turn))
        if turn:
            ancestors = self.population.resample(step.index)
            step.follow(ancestors)
            for potential in self.potentials:
                potential.follow(ancestors)
        for potential in self.potentials:
            self._weigh(potential.move(step))

    def finish(self, samples: torch.Tensor) -> torch.Tensor | None:
        for potential in self.potentials:
            self._weigh(potential.finish(samples))
        ancestors = None
        if self._finish == "resample":
            ancestors = self.population.resample(self._calls, threshold=1.0)
            for potential in self.potentials:
                potential.follow(ancestors)
        self.population.finish()
        return ancestors

    def _weigh(self, increments: torch.Tensor | None) -> None:
        if increments is not None:
            self.population.weigh(increments)
