"""SVDD: every step draws several candidates and goes on from one that promises reward (arXiv 2408.08252)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep

from .populations import GroupStreams, check_particles, groups_of, precise, resample, warn_without_noise
from .rewards import Reward, RewardFunction


class Value(Protocol):
    """An estimate of the reward to come."""

    def of_step(self, step: GuidedStep, where: str) -> torch.Tensor:
        """Of the samples of a step, ``(batch,)``."""
        ...

    def of_results(self, samples: torch.Tensor) -> torch.Tensor:
        """Of the results of a run ``(batch, ...)``."""
        ...


class PosteriorMeanValue:
    """The reward of the predicted clean sample: no training, no network call.

    Args:
        reward: of clean samples.
    """

    def __init__(self, reward: Reward | RewardFunction) -> None:
        self.reward = Reward.of(reward)

    def of_step(self, step: GuidedStep, where: str) -> torch.Tensor:
        """See ``Value``."""
        return self.reward(step.clean, where)

    def of_results(self, samples: torch.Tensor) -> torch.Tensor:
        """See ``Value``."""
        return self.reward(samples, "the end")


def choose(values: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """One of each group by ``softmax(values / temperature)``.

    Args:
        values: ``(groups, candidates)``.
        temperature: 0 takes the first of the largest, infinity any.
        uniforms: ``(groups, 1)`` in [0, 1), float64.

    Returns:
        ``(groups, 1)``, int64.
    """
    if temperature == 0.0:
        return values.argmax(1, keepdim=True)
    logits = values.to(precise(values))
    logits = (logits - logits.amax(1, keepdim=True)) / temperature
    # A single number in [0, 1) inverts the cumulative sum; as many columns as candidates are read.
    return resample(logits, uniforms.to(logits).expand_as(logits), "multinomial")[:, :1]


class SVDD(Guidance):
    """Soft value-based decoding (arXiv 2408.08252) inside any pipeline, at no network call beside its own.

    ``scheduler.guide(SVDD(reward, candidates=8, temperature=0.1))``, then the pipeline with
    ``num_images_per_prompt=8``: the eight are the candidates of one chain. When the network has been evaluated at all
    of them, one is chosen by its value, and all eight places draw their next candidate from there. The images of a
    prompt end up equal; take the first of each chain. The scheduler must draw noise (``sde-dpm++1`` is DDPM), or all
    candidates are one.

    The target is ``p(x) exp(reward(x) / temperature)``. It is met for many candidates and the exact value; the reward
    of the posterior mean trusts noisy predictions too much. At temperature 0, which the paper's released code uses
    whatever its text says, chains collapse onto the optimum of the reward.

    A pipeline that doubles its batch for guidance (DiT) makes twice the chains; the first half counts.

    Args:
        value: a reward, which is asked at the predicted clean sample; or a ``LearnedValue``.
        candidates: ``M``, of a chain; neighbours in the batch.
        temperature: ``alpha``, in units of the reward; 0 takes the best, infinity any.
        chains: of a prompt, each of ``candidates`` neighbours; they exchange nothing unless ``replace`` says so.
        replace: SVDD-R: share of a prompt's chains, the worst, that go on from others, drawn by their values; the paper
            takes 0.03 to 0.05.
        start: share of the network calls after which one is chosen; before it, candidates go their own ways.
        stop: share of the calls after which they do again.
        seeds: of the choices: of chain 0 (chain ``k`` then has ``seeds + k``), or one a chain; ``None`` draws one from
            torch's global state.

    Attributes:
        values: of the chosen ones, ``(calls, chains)``, after a run.

    Raises:
        ValueError: impossible options.
    """

    values: torch.Tensor

    def __init__(
        self,
        value: Value | Reward | RewardFunction,
        *,
        candidates: int,
        temperature: float,
        chains: int = 1,
        replace: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        seeds: int | Sequence[int] | None = None,
    ) -> None:
        check_particles("candidates", candidates)
        check_particles("chains", chains)
        if not temperature >= 0.0:
            raise ValueError(f"temperature {temperature} must be at least 0, which takes the best candidate")
        if not 0.0 <= replace < 1.0:
            raise ValueError(f"replace {replace} must be a share of the chains, at least 0 and below 1")
        if replace and int(replace * chains) == 0:
            raise ValueError(f"replace {replace} of {chains} chains is none; give more chains, or replace=0")
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(f"start {start} and stop {stop} must be shares of the run, 0 <= start < stop <= 1")
        self.value = PosteriorMeanValue(value) if callable(value) else value
        self.candidates, self.temperature, self.chains, self.seeds = candidates, temperature, chains, seeds
        self._replaced, self._interval = int(replace * chains), (start, stop)

    def start(self, run: GuidedRun) -> None:
        if self.candidates > 1:
            warn_without_noise(run, "candidates")
        groups_of(len(run.sample), self.candidates * self.chains)
        self._calls = len(run.plan)
        first, last = (round(share * self._calls) for share in self._interval)
        self._active = range(first, last)
        self._streams = GroupStreams(self.seeds)
        self._chosen: list[torch.Tensor] = []

    def act(self, step: GuidedStep) -> None:
        if step.index in self._active:
            values = self.value.of_step(step, f"call {step.index + 1} of {self._calls}")
            step.follow(self._select(values, step.index))

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        ancestors = self._select(self.value.of_results(samples), self._calls)
        self.values = torch.stack(self._chosen)
        return ancestors

    def _select(self, values: torch.Tensor, index: int) -> torch.Tensor:
        """The sample from which each place goes on."""
        values = values.view(-1, self.candidates)
        uniforms = self._streams.draw(len(values), 2, index).to(values.device)
        picked = choose(values, self.temperature, uniforms[:, :1])
        worth = values.gather(1, picked)
        source = (picked + self.candidates * torch.arange(len(values), device=values.device)[:, None]).squeeze(1)
        if self._replaced:
            source, worth = self._exchange(source, worth, uniforms[:, 1:])
        self._chosen.append(worth.squeeze(1))
        return source.repeat_interleave(self.candidates)

    def _exchange(
        self, source: torch.Tensor, worth: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The worst chains of each prompt go on from chains that are drawn by their values."""
        values = worth.view(-1, self.chains)
        if self.temperature == 0.0 or math.isinf(self.temperature):
            drawn = choose(values, self.temperature, uniforms.view_as(values)[:, :1]).expand_as(values)
        else:
            drawn = resample(values / self.temperature, uniforms.view_as(values), "multinomial")
        own = torch.arange(self.chains, device=values.device).expand_as(values)
        rank = values.argsort(stable=True, dim=1).argsort(1)
        kept = torch.where(rank < self._replaced, drawn, own)
        return source.view_as(values).gather(1, kept).flatten(), values.gather(1, kept).view_as(worth)
