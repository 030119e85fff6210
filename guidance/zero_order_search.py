"""Zero-order search over noises: from noise to better noise nearby (arXiv 2501.09732)."""

from __future__ import annotations

import math
from typing import Any

import torch

from fewstep.samplers import Denoiser

from .noise_search import Candidates, NoiseSearch, Verifier


class ZeroOrderSearch(NoiseSearch):
    """Climbs from noise to better noise nearby (arXiv 2501.09732, section 3.1).

    The first round draws noises at random; each later one looks at neighbours of the best so far. The sampler must
    draw no noise of its own, or a noise does not tell its sample.

    Args:
        denoiser: as of ``NoiseSearch``, like the other arguments.
        scheduler: a deterministic one.
        num_inference_steps: steps of a run.
        reward: the verifier.
        candidates: of each prompt in a round.
        seed: of prompt 0.
        similarity: cosine of the angle between a noise and its neighbours, 0.95 in public code. The paper gives no law
            of neighbours; these have the pivot's norm and a random direction around it, so that a neighbour of
            standard normal noise is standard normal.

    Raises:
        ValueError: impossible options; in ``run``, a sampler that draws noise.
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
        similarity: float = 0.95,
    ) -> None:
        if not -1.0 < similarity < 1.0:
            raise ValueError(f"similarity {similarity} must lie between -1 and 1; 0.95 is usual, larger stays nearer")
        super().__init__(denoiser, scheduler, num_inference_steps, reward, candidates=candidates, seed=seed)
        self.similarity = similarity

    @property
    def cost(self) -> int:
        return self._calls() * self.groups * self.candidates

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "similarity": self.similarity}

    def _round(self, number: int) -> Candidates:
        noise = self._normal(number, 0)
        if number:
            noise = neighbours(self._best["noise"].cpu(), noise, self.similarity)
        generators = self._generators(number)
        before = [generator.get_state() for generator in generators]
        samples = self._sampled(noise, generators)
        if not all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True)):
            raise ValueError(
                f"{type(self.scheduler).__name__} draws noise of its own, so that neighbours of a noise have nothing "
                "in common; use a deterministic sampler, or RandomSearch"
            )
        return Candidates(noise, samples, self._judged(samples, f"round {number + 1}"))


def neighbours(pivot: torch.Tensor, directions: torch.Tensor, similarity: float) -> torch.Tensor:
    """Noises of the pivot's norm at a given angle from it.

    Args:
        pivot: ``(groups, ...)``.
        directions: standard normal, ``(groups, count, ...)``.
        similarity: cosine of the angle.

    Returns:
        shaped and typed like ``directions``; standard normal where the pivot is.
    """
    centre, around = pivot.flatten(1).double()[:, None], directions.flatten(2).double()
    norm = centre.norm(dim=2, keepdim=True)
    axis = centre / norm
    across = around - (around * axis).sum(2, keepdim=True) * axis
    across = across / across.norm(dim=2, keepdim=True)
    found = norm * (similarity * axis + math.sqrt(1.0 - similarity**2) * across)
    return found.view(directions.shape).to(directions.dtype)
