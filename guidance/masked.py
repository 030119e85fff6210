"""Masked discrete diffusion: exact samplers (arXiv 2409.02908), with SVDD (arXiv 2408.08252) or energies in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .populations import check_particles
from .rewards import Reward, RewardFunction
from .svdd import choose

MaskedModel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``model(tokens, times)``: tokens ``(batch, length)``, int64, where the mask is the number ``vocabulary``; times
``(batch,)`` in [0, 1], the share of masked tokens that is expected, which a time-agnostic model ignores. Returns logits
``(batch, length, vocabulary)`` of the clean tokens; those of tokens that are known are not read."""

Energy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``energy(clean, tokens, log_proposal)``: whole sequences ``(batch, length)``, what was known of them (with masks),
and the log-probability ``(batch,)`` with which the model's independent predictions proposed the rest. Returns
``(batch,)``. With an autoregressive model it is ``log_proposal - log_likelihood(clean)``."""


def sample_categorical(
    logits: torch.Tensor, generator: torch.Generator | None = None, *, chunk: int = 65536
) -> torch.Tensor:
    """Exact categorical samples: one float64 number inverts a float64 cumulative sum.

    Gumbel noise and ``torch.multinomial`` in float32 cut the tail of the uniform numbers off, which lowers the
    temperature of a categorical of many classes (arXiv 2409.02908, section 5).

    Args:
        logits: ``(..., classes)``, up to a constant each.
        generator: of the noise, on its own device.
        chunk: rows at a time, to bound the memory.

    Returns:
        ``(...)``, int64.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    device = logits.device if generator is None else generator.device
    uniforms = torch.rand(len(rows), generator=generator, device=device, dtype=torch.float64).to(logits.device)
    drawn = [_inverted(part, points) for part, points in zip(rows.split(chunk), uniforms.split(chunk), strict=True)]
    return torch.cat(drawn).view(logits.shape[:-1])


def _inverted(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    cumulative = torch.softmax(logits.double(), dim=1).cumsum(1)
    # Ends at exactly 1: a class of probability 0 is never drawn.
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, points[:, None], right=True).squeeze(1)


class MaskedSVDD:
    """SVDD for masked diffusion: of several candidates for the next sequence, one is chosen by its value.

    Args:
        reward: of sequences without masks, ``(batch, length)`` int64 to ``(batch,)``.
        candidates: ``M``, of each sequence.
        temperature: ``alpha``; 0 takes the best, infinity any.
        value: ``value(tokens)`` of sequences with masks, to ``(batch,)``: a learned value, or an exact one. ``None``
            fills the masks by the network's prediction and takes the reward of that.
        fill: how: ``argmax``, a point as in the paper's released code, or ``sample``.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        reward: Reward | RewardFunction,
        *,
        candidates: int,
        temperature: float,
        value: RewardFunction | None = None,
        fill: str = "argmax",
    ) -> None:
        check_particles("candidates", candidates)
        if not temperature >= 0.0:
            raise ValueError(f"temperature {temperature} must be at least 0, which takes the best candidate")
        if fill not in ("argmax", "sample"):
            raise ValueError(f"fill {fill!r} is unknown; use argmax or sample")
        self.reward, self.candidates, self.temperature, self.fill = Reward.of(reward), candidates, temperature, fill
        self.value = None if value is None else Reward(value, name="value")

    def values(
        self, tokens: torch.Tensor, logits: torch.Tensor, generator: torch.Generator | None, where: str
    ) -> torch.Tensor:
        """Of sequences ``(batch, length)`` for which the network said ``logits``, ``(batch,)``."""
        masked = tokens == logits.shape[-1]
        if self.value is not None:
            return self.value(tokens, where)
        guess = logits.argmax(-1) if self.fill == "argmax" else sample_categorical(logits, generator)
        return self.reward(torch.where(masked, guess, tokens), where)


class EnergyChoice:
    """Energy-based denoising: tokens that appear together are drawn together (arXiv 2410.21357, algorithm 1).

    A masked model predicts every token by itself. Of several whole sequences drawn from its predictions, one is chosen
    with probability proportional to ``exp(-energy)``, and the tokens that appear are its own. It is exact for many
    draws and the energy ``log_proposal - log p(clean)``; one draw, or equal energies, is the model itself.

    Args:
        energy: see ``Energy``.
        draws: ``k``, of each sequence in each step, at no network call; the paper finds little beyond 16.

    Raises:
        ValueError: no draws; in a step, energies of another shape or that are no finite numbers.
    """

    def __init__(self, energy: Energy, draws: int) -> None:
        check_particles("draws", draws)
        self.energy, self.draws = energy, draws

    def clean(self, tokens: torch.Tensor, logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Whole sequences ``(batch, length)`` for tokens ``(batch, length)``, by the model's ``logits``."""
        masked = (tokens == logits.shape[-1])[:, None]
        several = logits[:, None].expand(-1, self.draws, -1, -1)
        drawn = sample_categorical(several, generator)
        log_p = several.double().log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        log_proposal = torch.where(masked, log_p, 0.0).sum(-1).flatten()
        clean = torch.where(masked, drawn, tokens[:, None])
        known = tokens.repeat_interleave(self.draws, 0)
        values = Reward(lambda x: -self.energy(x, known, log_proposal), name="minus energy")(clean.flatten(0, 1))
        device = logits.device if generator is None else generator.device
        uniforms = torch.rand(len(tokens), 1, generator=generator, device=device, dtype=torch.float64)
        picked = choose(values.view(-1, self.draws), 1.0, uniforms.to(values.device))
        return clean.gather(1, picked[..., None].expand(-1, -1, tokens.shape[1])).squeeze(1)


class MaskedSampler:
    """Samples sequences from a masked diffusion model.

    Args:
        model: see ``MaskedModel``.
        length: of the sequences.
        vocabulary: number of tokens beside the mask.
        device: of the tokens.

    Attributes:
        calls: how often the model was called.
        evaluations: the same, counted for each sequence of a batch.

    Raises:
        ValueError: impossible sizes.
    """

    calls: int = 0
    evaluations: int = 0

    def __init__(self, model: MaskedModel, *, length: int, vocabulary: int, device: str | torch.device = "cpu") -> None:
        if length < 1 or vocabulary < 1:
            raise ValueError(f"length {length} and vocabulary {vocabulary} must be at least 1")
        self.model, self.length, self.vocabulary, self.device = model, length, vocabulary, torch.device(device)

    def first_hitting(
        self,
        count: int,
        *,
        tokens_per_call: int = 1,
        steering: MaskedSVDD | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """First-hitting sampling: straight to the times at which tokens appear (arXiv 2409.02908, algorithm 1).

        With one token a call it is exact: the limit of infinitely many steps of ``ancestral`` in ``length`` calls.
        Every sequence has its own times.

        Args:
            count: number of sequences.
            tokens_per_call: that appear together, by the same prediction; above 1 it is an approximation.
            steering: chooses among candidates for every call.
            generator: of all noise.

        Returns:
            ``(count, length)``, int64.
        """
        if tokens_per_call < 1:
            raise ValueError(f"tokens_per_call {tokens_per_call} must be at least 1")

        def step(tokens: torch.Tensor, times: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            masked = tokens == self.vocabulary
            left = int(masked[0].sum())  # the same in all sequences
            for n in range(left, max(left - tokens_per_call, 0), -1):
                # The largest of n uniform times below the last one.
                times = times * self._uniform((len(tokens),), generator) ** (1.0 / n)
                place = torch.where(masked, self._uniform(tokens.shape, generator), -1.0).argmax(1, keepdim=True)
                chosen = logits.gather(1, place[..., None].expand(-1, -1, self.vocabulary)).squeeze(1)
                drawn = sample_categorical(chosen, generator)[:, None]
                tokens, masked = tokens.scatter(1, place, drawn), masked.scatter(1, place, False)
            return tokens, times

        return self._run(count, math.ceil(self.length / tokens_per_call), step, steering, generator)

    def ancestral(
        self,
        count: int,
        *,
        steps: int,
        energy: EnergyChoice | None = None,
        steering: MaskedSVDD | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Ancestral sampling with the linear schedule in equal steps.

        Whether a token appears and which one it is are drawn one after the other, so that the mask, which has almost
        all probability, does not compete with the tokens.

        Args:
            count: number of sequences.
            steps: number of network calls.
            energy: lets tokens that appear in one step depend on each other.
            steering: chooses among candidates for every call.
            generator: of all noise.

        Returns:
            ``(count, length)``, int64.
        """
        if steps < 1:
            raise ValueError(f"steps {steps} must be at least 1")

        def step(tokens: torch.Tensor, times: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            left = round(float(times[0]) * steps)
            appears = (tokens == self.vocabulary) & (self._uniform(tokens.shape, generator) < 1.0 / left)
            if energy is None:
                following = tokens.clone()
                following[appears] = sample_categorical(logits[appears], generator)
            else:
                following = torch.where(appears, energy.clean(tokens, logits, generator), tokens)
            return following, torch.full_like(times, (left - 1) / steps)

        return self._run(count, steps, step, steering, generator)

    def _run(
        self,
        count: int,
        calls: int,
        step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        steering: MaskedSVDD | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        each = 1 if steering is None else steering.candidates
        batch = count * each
        tokens = torch.full((batch, self.length), self.vocabulary, dtype=torch.int64, device=self.device)
        times = torch.ones(batch, dtype=torch.float64, device=self.device)
        for index in range(calls):
            logits = self._logits(tokens, times)
            if steering is not None and index:  # all candidates start as one
                values = steering.values(tokens, logits, generator, f"call {index + 1} of {calls}")
                source = self._chosen(values, steering, generator)
                tokens, times, logits = tokens[source], times[source], logits[source]
            tokens, times = step(tokens, times, logits)
        if steering is not None:
            tokens = tokens[self._chosen(steering.reward(tokens, "the end"), steering, generator)[::each]]
        return tokens

    def _chosen(self, values: torch.Tensor, steering: MaskedSVDD, generator: torch.Generator | None) -> torch.Tensor:
        values = values.view(-1, steering.candidates)
        picked = choose(values, steering.temperature, self._uniform((len(values), 1), generator)).squeeze(1)
        first = steering.candidates * torch.arange(len(values), device=values.device)
        return (picked + first).repeat_interleave(steering.candidates)

    def _logits(self, tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(tokens, times.float())
        if logits.shape != (*tokens.shape, self.vocabulary):
            raise ValueError(
                f"model returned shape {tuple(logits.shape)}; it must be {(*tokens.shape, self.vocabulary)}, a number "
                "for each token without the mask"
            )
        self.calls += 1
        self.evaluations += len(tokens)
        return logits

    def _uniform(self, shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
        device = self.device if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64).to(self.device)
