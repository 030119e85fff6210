"""What weighs particles: log-potentials along a run, whose product tilts the law of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fewstep.samplers.guided import GuidedRun, GuidedStep

from .populations import precise
from .rewards import Reward, RewardFunction


class Potential:
    """A factor of the particles' weights; this class itself is 1 everywhere."""

    def start(self, run: GuidedRun) -> None:
        """Forgets the run before."""

    def weigh(self, step: GuidedStep, *, active: bool, turn: bool) -> torch.Tensor | None:
        """The weight of where the particles stand, known with the network's output.

        It may also change the prediction (``step.predict``), in every step.

        Args:
            step: before any resampling.
            active: whether the weight counts.
            turn: whether particles may also resample in this step: slow potentials need not be asked in others.

        Returns:
            log-weights ``(batch,)``, or ``None`` for 1.
        """
        return None

    def follow(self, ancestors: torch.Tensor) -> None:
        """Gathers what is kept of each particle, ``(batch,)`` ancestors."""

    def move(self, step: GuidedStep) -> torch.Tensor | None:
        """Changes the proposal (``step.shift_noise``) and returns the log-weight that makes up for it, ``(batch,)``."""
        return None

    def finish(self, samples: torch.Tensor) -> torch.Tensor | None:
        """The weight of the results ``(batch, ...)``."""
        return None


def _difference(value: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return value if kept is None else value - kept, value


def _largest(value: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    # From minus infinity: a maximum that began at 0 would not tell negative rewards apart.
    largest = value if kept is None else torch.maximum(value, kept)
    return largest, largest


def _sum(value: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    total = value if kept is None else value + kept
    return total, total


KINDS: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]] = {
    "difference": _difference,
    "max": _largest,
    "sum": _sum,
}
"""Potentials of arXiv 2501.06848 by name: from this value and what was kept, the log-potential and what to keep."""


class RewardTilt(Potential):
    """Tilts the law of a sampler's results by ``exp(scale * reward)`` (FK steering, arXiv 2501.06848).

    On the way a particle is worth the reward of its predicted clean sample, which costs no network call. Whatever the
    potential, the last weight makes the product ``exp(scale * reward(result))``. (The paper's released code ends with
    the running maximum or sum in the place of the reward, starts the maximum at 0, and loses weights where it does not
    resample; none of that here.)

    Args:
        reward: of clean samples ``(batch, ...)``; a ``Reward`` to decode them first.
        scale: inverse temperature ``lambda``; 0 changes nothing.
        potential: ``difference`` of the reward to the last time, ``max`` or ``sum`` of it over the times so far. They
            differ in variance only.
        gradient_scale: above 0, proposals are moved along the gradient of the reward at the predicted clean sample
            (through the reward, not the network): 1 is the twisted proposal of arXiv 2306.17775 with the Jacobian of
            the prediction replaced by ``alpha / (alpha^2 + sigma^2)``, 0.5 the drift of arXiv 2503.02819, proposition
            3.4, which overshoots less. The weights make up for it exactly. Acts in the steps that draw noise.

    Attributes:
        values: rewards ``(batch,)`` of the particles as they stand; after a run, of the results.

    Raises:
        ValueError: impossible options.
    """

    values: torch.Tensor

    def __init__(
        self,
        reward: Reward | RewardFunction,
        scale: float = 1.0,
        *,
        potential: str = "difference",
        gradient_scale: float = 0.0,
    ) -> None:
        if potential not in KINDS:
            raise ValueError(f"potential {potential!r} is unknown; use one of {', '.join(KINDS)}")
        if not 0.0 <= scale < float("inf"):
            raise ValueError(f"scale {scale} must be at least 0; for low rewards negate the reward")
        if not 0.0 <= gradient_scale < float("inf"):
            raise ValueError(
                f"gradient_scale {gradient_scale} must be at least 0, which leaves the sampler's proposals"
            )
        self.reward, self.scale = Reward.of(reward), scale
        self.potential, self.gradient_scale = potential, gradient_scale

    def start(self, run: GuidedRun) -> None:
        self._calls = len(run.plan)
        self._kept: torch.Tensor | None = None
        self._spent: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None

    def weigh(self, step: GuidedStep, *, active: bool, turn: bool) -> torch.Tensor | None:
        if not turn:
            return None
        where = f"call {step.index + 1} of {self._calls}"
        if self.gradient_scale > 0.0 and step.noise is not None:
            self.values, self._gradient = self.reward.with_gradient(step.clean, where)
        else:
            self.values = self.reward(step.clean, where)
        increment, self._kept = KINDS[self.potential](self.scale * self.values.to(precise(step.sample)), self._kept)
        self._spent = increment if self._spent is None else self._spent + increment
        return increment

    def follow(self, ancestors: torch.Tensor) -> None:
        for name in ("_kept", "_spent", "_gradient", "values"):
            kept = getattr(self, name, None)
            if kept is not None:
                setattr(self, name, kept.index_select(0, ancestors))

    def move(self, step: GuidedStep) -> torch.Tensor | None:
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            return None
        assert step.noise is not None
        call = step.call
        slope = call.alpha / (call.alpha**2 + call.sigma**2)
        shift = (self.gradient_scale * self.scale * slope * step.noise_scale) * gradient
        drawn = step.noise.flatten(1).to(precise(shift))
        step.shift_noise(shift)
        moved = shift.flatten(1).to(drawn.dtype)
        return -(moved * (drawn + 0.5 * moved)).sum(1)

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        self.values = self.reward(samples, "the end")
        value = self.scale * self.values.to(precise(samples))
        return value if self._spent is None else value - self._spent
