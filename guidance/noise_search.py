"""Search over noises: more network calls for a better sample, judged by a verifier (arXiv 2501.09732)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewstep.samplers import Denoiser, sample
from fewstep.samplers.files import replaced
from fewstep.samplers.loop import tried
from fewstep.samplers.noise import NoiseStreams, derived_seed

from .populations import check_particles, groups_of
from .rewards import Reward, RewardFunction
from .verifiers import VerifierEnsemble, mean_ranks

_FORMAT = "fewstep.noise_search"

Verifier = Reward | RewardFunction | VerifierEnsemble
"""What judges the samples of a search."""


@dataclass(frozen=True)
class SearchRound:
    """A round of a search.

    Attributes:
        evaluations: of the network, up to its end, a sample of a batch each; all groups together.
        values: of its candidates, ``(groups, candidates)``, on the CPU; of an ensemble ``(groups, candidates,
            rewards)``.
    """

    evaluations: int
    values: torch.Tensor


@dataclass(frozen=True)
class SearchResult:
    """The best that a search has found.

    Attributes:
        noise: that the best samples began with, ``(groups, *shape)``: the ``latents`` of a pipeline's call. After a
            search over paths, and with samplers that draw noise of their own, it does not give them again by itself.
        samples: the best ones, ``(groups, *shape)``, for ``Denoiser.decode``.
        values: their rewards, ``(groups,)``; of an ensemble ``(groups, rewards)``.
        history: the rounds so far.
    """

    noise: torch.Tensor
    samples: torch.Tensor
    values: torch.Tensor
    history: tuple[SearchRound, ...]

    @property
    def evaluations(self) -> int:
        """Of the network, so far."""
        return self.history[-1].evaluations


@dataclass(frozen=True)
class Candidates:
    """What a round has made: ``(groups, candidates, ...)`` noises, samples and their values."""

    noise: torch.Tensor
    samples: torch.Tensor
    values: torch.Tensor


class NoiseSearch(ABC):
    """Base of the searches: rounds over the batch of a denoiser, whose neighbours are the candidates of a prompt.

    A search is anytime: ``run`` may be called again and goes on, in another process after ``save`` and ``load`` too,
    with the results of one long run. All draws follow from the seed.

    Args:
        denoiser: of a pipeline with its prompts, made with ``num_images_per_prompt=candidates``.
        scheduler: of the runs, such as ``UniPCScheduler.from_config(denoiser.scheduler_config)``.
        num_inference_steps: steps of a run; a search may well take fewer than the run that its noise is for.
        reward: the verifier, of what the scheduler steps; a ``Reward`` to decode it first, a ``VerifierEnsemble`` of
            several. What is reported should be another measure than what was searched for.
        candidates: of each prompt in a round.
        seed: of prompt 0; prompt ``k`` has ``seed + k``.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        num_inference_steps: int,
        reward: Verifier,
        *,
        candidates: int,
        seed: int = 0,
    ) -> None:
        check_particles("candidates", candidates)
        self.groups = groups_of(denoiser.batch_size, candidates)
        self.denoiser, self.scheduler, self.steps = denoiser, scheduler, num_inference_steps
        self.reward = reward if isinstance(reward, VerifierEnsemble) else Reward.of(reward)
        self.candidates, self.seed = candidates, seed
        self._streams = NoiseStreams([seed + group for group in range(self.groups)])
        self._history: list[SearchRound] = []
        self._best: dict[str, torch.Tensor] = {}

    # ---------------------------------------------------------------- what a search is

    @property
    @abstractmethod
    def cost(self) -> int:
        """Evaluations of the network in a round, a sample of a batch each; all groups together."""

    @abstractmethod
    def _round(self, number: int) -> Candidates:
        """Makes and judges the candidates of a round."""

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a saved search to go on."""
        return {
            "class": type(self).__name__,
            "groups": self.groups,
            "candidates": self.candidates,
            "steps": self.steps,
            "seed": self.seed,
            "shape": list(self.denoiser.shape),
            "rewards": len(self.reward.rewards) if isinstance(self.reward, VerifierEnsemble) else 1,
        }

    # ---------------------------------------------------------------- running

    def run(self, evaluations: int) -> SearchResult:
        """Searches until another round would exceed a budget.

        Args:
            evaluations: of the network that may be spent now, a sample of a batch each, all groups together: as
                ``denoiser.evaluations`` counts them. Both branches of guidance are one. A ``DrivenDenoiser`` that also
            decodes for the reward starts its pipeline once more in its first round, which takes a call more.

        Raises:
            ValueError: the first round exceeds the budget, or the reward is wrong.
        """
        cost = self.cost
        if cost > evaluations and not self._history:
            raise ValueError(
                f"evaluations {evaluations} are too few for a round, which takes {cost}: {self.groups} x "
                f"{self.candidates} samples; give more, or fewer candidates or steps"
            )
        spent = 0
        while spent + cost <= evaluations:
            before = self.denoiser.evaluations
            found = self._round(len(self._history))
            used = self.denoiser.evaluations - before
            spent += used
            total = self._history[-1].evaluations if self._history else 0
            self._take(found)
            self._history.append(SearchRound(total + used, found.values.cpu()))
        return self.result

    @property
    def result(self) -> SearchResult:
        """What was found so far.

        Raises:
            ValueError: nothing was searched yet.
        """
        if not self._history:
            raise ValueError("nothing was searched yet; call run")
        best = self._best
        return SearchResult(best["noise"], best["samples"], best["values"], tuple(self._history))

    def _take(self, found: Candidates) -> None:
        """Keeps the best of each group."""
        values = found.values
        if self._best:
            values = torch.cat([self._best["values"].to(values)[:, None], values], 1)
        scores = self._scores(values)
        ahead = scores[:, -self.candidates :]
        chosen = self._ranked(ahead, len(self._history), 0)[:, :1]
        new = {name: gathered(getattr(found, name), chosen).squeeze(1) for name in _KEPT}
        if self._best:
            better = (ahead.gather(1, chosen) > scores[:, :1]).squeeze(1)
            for name, value in new.items():
                kept = self._best[name].to(value.device)
                new[name] = torch.where(better.to(value.device).view(-1, *[1] * (value.ndim - 1)), value, kept)
        self._best = new

    def _scores(self, values: torch.Tensor) -> torch.Tensor:
        """What candidates are compared by, ``(groups, candidates)``, of their values."""
        return mean_ranks(values) if isinstance(self.reward, VerifierEnsemble) else values

    def _ranked(self, scores: torch.Tensor, number: int, stage: int) -> torch.Tensor:
        """Numbers of the candidates from best to worst, ``(groups, candidates)``; equals in random order.

        Verifiers in half precision have many equals, and the first of them must not be favoured.
        """
        shape = torch.Size([self.groups, self.candidates])
        keys = self._streams.draw(_key(number, _TIES + stage, 0), shape, scores.device, torch.float64)
        mixed = keys.argsort(1)
        return mixed.gather(1, scores.gather(1, mixed).argsort(dim=1, descending=True, stable=True))

    # ---------------------------------------------------------------- saving

    def save(self, path: str | Path) -> None:
        """Writes what was found into one ``.safetensors`` file.

        Raises:
            ValueError: nothing was searched yet.
        """
        path, history = Path(path), self.result.history
        tensors = {f"best.{name}": value.detach().cpu().contiguous() for name, value in self._best.items()}
        tensors["history"] = torch.stack([one.values for one in history])
        record = {
            "format": _FORMAT,
            "settings": self._settings(),
            "evaluations": [one.evaluations for one in history],
        }
        with replaced(path) as partial:
            save_file(tensors, partial, metadata={"record": json.dumps(record)})

    def load(self, path: str | Path) -> NoiseSearch:
        """Goes on from a file of ``save``; returns itself.

        Raises:
            ValueError: no such file, or one of a search with other settings.
        """
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path {path} holds no saved search: {error}") from error
        if record.get("format") != _FORMAT:
            raise ValueError(f"path {path} holds no saved search; give a file written by save")
        settings = self._settings()
        different = [name for name in settings if record["settings"].get(name) != settings[name]]
        if different:
            raise ValueError(f"path {path} holds a search with other settings: {', '.join(different)}")
        self._best = {name: tensors[f"best.{name}"] for name in _KEPT}
        self._history = [
            SearchRound(spent, values) for spent, values in zip(record["evaluations"], tensors["history"], strict=True)
        ]
        return self

    # ---------------------------------------------------------------- parts of a round

    def _normal(self, number: int, stage: int) -> torch.Tensor:
        """Standard normal, ``(groups, candidates, *shape)``, float32: of the seed, group, round and stage alone."""
        shape = torch.Size([self.groups, *self.denoiser.shape])
        draws = [
            self._streams.draw(_key(number, stage, k), shape, torch.device("cpu"), torch.float32)
            for k in range(self.candidates)
        ]
        return torch.stack(draws, dim=1)

    def _generators(self, number: int) -> list[torch.Generator]:
        """For the noise that samplers draw themselves, one a candidate."""
        return [
            torch.Generator().manual_seed(derived_seed(self.seed + group, number, k, 2))
            for group in range(self.groups)
            for k in range(self.candidates)
        ]

    def _sampled(self, noise: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples ``(groups, candidates, ...)`` from noises of that shape."""
        samples = sample(self.denoiser, self.scheduler, self.steps, generator=generators, latents=noise.flatten(0, 1))
        return self._grouped(samples)

    def _judged(self, samples: torch.Tensor, where: str) -> torch.Tensor:
        """Values ``(groups, candidates)`` of samples ``(groups, candidates, ...)``; of an ensemble one a reward."""
        return self._grouped(self.reward(samples.flatten(0, 1), where))

    def _grouped(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.unflatten(0, (self.groups, self.candidates))

    def _calls(self) -> int:
        """Network calls of a whole run."""
        return len(tried(self.scheduler, self.steps).timesteps)


_KEPT = ("noise", "samples", "values")
_TIES = 1 << 19


def _key(number: int, stage: int, candidate: int) -> int:
    """Which of a search's draws this is."""
    return (number << 40) | (stage << 20) | candidate


def gathered(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``(groups, count, ...)`` of ``(groups, candidates, ...)`` by numbers ``(groups, count)``."""
    index = chosen.to(values.device).view(*chosen.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*chosen.shape, *values.shape[2:]))
