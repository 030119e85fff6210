"""What guidance sees of a run, and what it may do there: the one protocol of everything that steers a sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .execute import PlanRun
from .plan import NOISE, SAMPLE, Call, Plan


@dataclass(frozen=True)
class GuidedRun:
    """A run that begins.

    Attributes:
        plan: all its calls.
        sample: the first sample, ``(batch, ...)``.
    """

    plan: Plan
    sample: torch.Tensor


class GuidedStep:
    """A step between its network call and its update.

    Attributes:
        index: of the call in the run's plan.
        sample: what the network saw, ``(batch, ...)``, in float32 or better.
        noise: standard normal, that the update reads; ``None`` where it reads none.
    """

    def __init__(
        self, run: PlanRun, sample: torch.Tensor, model_output: torch.Tensor, noise: torch.Tensor | None
    ) -> None:
        self._run, self._given, self._output = run, sample, model_output
        self.index = run.position
        self.sample = run.widened(sample)
        self.noise = noise
        self._clean: torch.Tensor | None = None

    @property
    def call(self) -> Call:
        """The plan's call: level, coefficients and rows."""
        return self._run.plan.calls[self.index]

    @property
    def following(self) -> tuple[float, float]:
        """``(alpha, sigma)`` of the next call, or of the result."""
        plan = self._run.plan
        if self.index + 1 < len(plan):
            call = plan.calls[self.index + 1]
            return call.alpha, call.sigma
        return plan.final_alpha, plan.final_sigma

    @property
    def model_output(self) -> torch.Tensor:
        """What the update will read, shaped like the sample."""
        return self._output

    @property
    def clean(self) -> torch.Tensor:
        """The predicted clean sample, in the dtype of ``sample``."""
        if self._clean is None:
            self._clean = self._run.predicted(self.sample, self._output)
        return self._clean

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise in the next sample."""
        return sum(c for row in self.call.rows if row.out == SAMPLE for slot, c in row.terms if slot == NOISE)

    def follow(self, ancestors: torch.Tensor) -> None:
        """Lets sample ``b`` go on from sample ``ancestors[b]``, with all that the run has kept of it.

        The noise stays with the place, so that copies part in this very update.

        Args:
            ancestors: ``(batch,)``, int64, on the sample's device.
        """
        self._run.reorder(ancestors)
        self._given, self.sample, self._output = (
            v.index_select(0, ancestors) for v in (self._given, self.sample, self._output)
        )
        if self._clean is not None:
            self._clean = self._clean.index_select(0, ancestors)

    def predict(self, clean: torch.Tensor) -> None:
        """Puts another predicted clean sample in the place of the network's.

        Args:
            clean: shaped like ``sample``.
        """
        p, q = self.call.clean
        self._output = (clean - p * self.sample) / q
        self._clean = None

    def shift_noise(self, shift: torch.Tensor) -> None:
        """Adds to the noise: the next sample is drawn around another mean, ``noise_scale * shift`` away.

        The sampler's kept predictions stay what they are.

        Raises:
            ValueError: the update reads no noise.
        """
        if self.noise is None:
            raise ValueError(f"call {self.index} of the plan adds no noise to shift; use a stochastic sampler")
        self.noise = self.noise + shift

    def apply(self, *, clean: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The update: ``PlanRun.step``."""
        return self._run.step(self._given, self._output, self.noise, clean=clean)


class Guidance:
    """What steers a sampler; this class itself changes nothing.

    Handed to a scheduler with ``scheduler.guide(guidance)``, it works in every pipeline that the scheduler serves in,
    and in ``sample``. The scheduler calls ``start`` at the first step of each run, ``act`` in every step, and
    ``finish`` after the last.
    """

    def start(self, run: GuidedRun) -> None:
        """Forgets the run before."""

    def act(self, step: GuidedStep) -> None:
        """Changes the prediction, the noise or the ancestors, between network and update."""

    def finish(self, samples: torch.Tensor) -> torch.Tensor | None:
        """Picks what the run returns.

        Args:
            samples: the results, ``(batch, ...)``.

        Returns:
            ancestors ``(batch,)``, int64: result ``b`` becomes result ``ancestors[b]``; or ``None``.
        """
        return None
