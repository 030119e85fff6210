"""Random search over noises: best-of-N, the baseline of every comparison."""

from __future__ import annotations

from .noise_search import Candidates, NoiseSearch


class RandomSearch(NoiseSearch):
    """The best of many independent noises: best-of-N, the baseline of every comparison.

    Arguments as of ``NoiseSearch``. Samplers that draw noise of their own are welcome.
    """

    @property
    def cost(self) -> int:
        return self._calls() * self.groups * self.candidates

    def _round(self, number: int) -> Candidates:
        noise = self._normal(number, 0)
        samples = self._sampled(noise, self._generators(number))
        return Candidates(noise, samples, self._judged(samples, f"round {number + 1}"))
