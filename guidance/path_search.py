"""Search over the noises on the way, not only the first ones (arXiv 2501.09732)."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch

from fewstep.samplers import Denoiser, PlanScheduler, PlanSchedulerOutput

from .noise_search import Candidates, NoiseSearch, Verifier, gathered


class PathSearch(NoiseSearch):
    """Searches over intermediate noises (arXiv 2501.09732, section 3.1).

    A round denoises all candidates part of the way, and then, again and again: keeps the best paths by the verifier at
    their predicted clean samples, noises each anew in several ways by ``forward`` steps, and denoises by ``backward``
    steps, until the end. (The paper begins with as many noises as paths are kept; here the first batch is as large as
    the others. It measures the three lengths in noise levels: 0.11, 0.78 and 0.81.)

    Args:
        denoiser: as of ``NoiseSearch``, like the other arguments.
        scheduler: of this package; any pipeline takes those.
        num_inference_steps: steps of a run.
        reward: the verifier; it must bear predictions from noise.
        candidates: of each prompt at a time, a multiple of ``paths``.
        seed: of prompt 0.
        paths: kept of each prompt.
        start: share of the steps before the first choice.
        forward: steps back towards noise, at least 1.
        backward: steps of denoising after that, more than ``forward``.

    Raises:
        ValueError: impossible options; in ``run``, a pipeline that starts from an image.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: PlanScheduler,
        num_inference_steps: int,
        reward: Verifier,
        *,
        candidates: int,
        seed: int = 0,
        paths: int = 2,
        start: float = 0.25,
        forward: int = 1,
        backward: int = 2,
    ) -> None:
        if not isinstance(scheduler, PlanScheduler):
            raise ValueError(
                f"scheduler {type(scheduler).__name__} cannot begin between its times with a new history; use one of "
                "fewstep.samplers, such as DPMSolverPPScheduler.from_config(denoiser.scheduler_config)"
            )
        if scheduler.order != 1:
            raise ValueError(
                f"scheduler {type(scheduler).__name__} takes {scheduler.order} calls a step; use a multistep one: its "
                "paths can turn back after every call"
            )
        if paths < 1 or candidates % paths:
            raise ValueError(f"candidates {candidates} must be a multiple of paths {paths}, each with as many branches")
        if not 0.0 < start <= 1.0:
            raise ValueError(f"start {start} must be a share of the steps, above 0 and at most 1")
        if not 1 <= forward < backward:
            raise ValueError(f"forward {forward} and backward {backward} must be whole, 1 <= forward < backward")
        super().__init__(denoiser, scheduler, num_inference_steps, reward, candidates=candidates, seed=seed)
        self.paths, self.start, self.forward, self.backward = paths, start, forward, backward

    @property
    def cost(self) -> int:
        stages = self._stages(self._calls())
        return sum(last - first for first, last in stages) * self.groups * self.candidates

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("paths", "start", "forward", "backward")}
        return {**super()._settings(), **own}

    def _stages(self, steps: int) -> list[tuple[int, int]]:
        """First and last node of each piece of denoising."""
        stages = [(0, min(max(round(self.start * steps), 1), steps))]
        while stages[-1][1] < steps:
            again = max(stages[-1][1] - self.forward, 0)
            stages.append((again, min(again + self.backward, steps)))
        return stages

    def _round(self, number: int) -> Candidates:
        noise, generators = self._normal(number, 0), self._generators(number)
        x, timesteps = self.denoiser.prepare(self.scheduler, self.steps, latents=noise.flatten(0, 1))
        fresh = copy.deepcopy(self.scheduler)
        if len(timesteps) != len(fresh.timesteps):
            raise ValueError("the pipeline starts from an image; a search over paths starts from noise: RandomSearch")
        stages = self._stages(len(timesteps))
        steps = len(timesteps)
        x, clean = self._denoised(fresh, x, stages[0], generators)
        for k, (before, after) in enumerate(itertools.pairwise(stages), 1):
            values = self._judged(self._grouped(clean), f"round {number + 1}, step {before[1]} of {steps}")
            best = self._ranked(self._scores(values), number, k)[:, : self.paths]
            branches = best.repeat_interleave(self.candidates // self.paths, 1)
            kept, noise = (gathered(v, branches) for v in (self._grouped(x), noise))
            x = self._renoised(fresh, kept, (before[1], after[0]), self._normal(number, k)).flatten(0, 1)
            x, clean = self._denoised(fresh, x, after, generators)
        samples = self._grouped(x)
        return Candidates(noise, samples, self._judged(samples, f"round {number + 1}"))

    def _renoised(
        self, scheduler: PlanScheduler, x: torch.Tensor, nodes: tuple[int, int], noise: torch.Tensor
    ) -> torch.Tensor:
        """The forward process from one node to an earlier one."""
        here, there = (scheduler.plan.calls[node] for node in nodes)
        gain = there.alpha / here.alpha
        spread = math.sqrt(max(there.sigma**2 - (gain * here.sigma) ** 2, 0.0))
        return gain * x + spread * noise.to(x.device, x.dtype)

    def _denoised(
        self, fresh: PlanScheduler, x: torch.Tensor, nodes: tuple[int, int], generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples at the last node, and the clean ones predicted on the way there."""
        scheduler = copy.deepcopy(fresh)
        first, last = nodes
        scheduler.set_begin_index(first)
        clean = x
        with torch.no_grad():
            for t in scheduler.timesteps[first:last]:
                output = self.denoiser(scheduler.scale_model_input(x, t), t)
                stepped = scheduler.step(output, t, x, generator=generators)
                assert isinstance(stepped, PlanSchedulerOutput)
                x, clean = stepped.prev_sample, stepped.pred_original_sample
        return x, clean
