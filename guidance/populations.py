"""Populations of weighted particles: neighbours in the batch, a group a prompt."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fewstep.samplers.guided import GuidedRun

Scheme = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``scheme(weights, uniforms)``: normalised ``(groups, particles)`` and numbers in [0, 1) of that shape, to ancestors
``(groups, particles)`` within each group, where particle ``i`` is expected ``particles * weights[i]`` times."""

_BELOW_ONE = 1.0 - 2.0**-53


def precise(like: torch.Tensor) -> torch.dtype:
    """float64, or float32 on devices that have no wider."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """``1 / sum W^2`` of the normalised weights.

    Args:
        log_weights: ``(groups, particles)``, up to a constant a group.

    Returns:
        ``(groups,)``, from 1 to the number of particles.
    """
    return torch.softmax(log_weights, dim=1).square().sum(1).reciprocal()


def resample(log_weights: torch.Tensor, uniforms: torch.Tensor, scheme: str = "systematic") -> torch.Tensor:
    """Ancestors of a new population of equal weights.

    Every scheme is unbiased: particle ``i`` is drawn ``particles * W_i`` times on average. Weights of zero are never
    drawn. Nothing is read from the device.

    Args:
        log_weights: ``(groups, particles)``, up to a constant a group; at least one of a group finite.
        uniforms: in [0, 1), float64, of the same shape; ``systematic`` reads the first column only.
        scheme: ``systematic`` (least noise; equal weights keep every particle once), ``stratified``, ``residual`` or
            ``multinomial``.

    Returns:
        ``(groups, particles)``, int64, numbers of particles in their group.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"resampling {scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
    weights = torch.softmax(log_weights.to(precise(log_weights)), dim=1)
    return SCHEMES[scheme](weights, uniforms.to(weights.dtype))


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The particle in whose part of the cumulative sum each point of [0, 1] falls."""
    cumulative = weights.cumsum(1)
    # Ends at exactly 1, so that no point lies behind the last particle that is alive.
    cumulative = cumulative / cumulative[:, -1:]
    points = points.clamp(max=_BELOW_ONE if points.dtype == torch.float64 else 1.0 - 2.0**-24)
    return torch.searchsorted(cumulative, points, right=True).clamp(max=weights.shape[1] - 1)


def _places(weights: torch.Tensor) -> torch.Tensor:
    return torch.arange(weights.shape[1], dtype=weights.dtype, device=weights.device)


def _systematic(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    return _invert(weights, (_places(weights) + uniforms[:, :1]) / weights.shape[1])


def _stratified(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    return _invert(weights, (_places(weights) + uniforms) / weights.shape[1])


def _multinomial(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    return _invert(weights, uniforms)


def _residual(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    expected = weights * weights.shape[1]
    # Equal weights may round to just below one copy each.
    copies = torch.floor(expected * (1.0 + 4.0 * torch.finfo(expected.dtype).eps))
    given = copies.cumsum(1)
    sure = torch.searchsorted(given, _places(weights).expand_as(given).contiguous(), right=True)
    drawn = _invert((expected - copies).clamp(min=0.0) + torch.finfo(expected.dtype).tiny * weights, uniforms)
    return torch.where(_places(weights) < given[:, -1:], sure, drawn)


SCHEMES: Mapping[str, Scheme] = {
    "systematic": _systematic,
    "stratified": _stratified,
    "residual": _residual,
    "multinomial": _multinomial,
}
"""Resampling schemes by name."""


class GroupStreams:
    """Uniform numbers that depend on the seed of a group and the step alone, whoever else is in the batch.

    Args:
        seeds: of group 0 (group ``k`` then has ``seeds + k``), or one a group; ``None`` draws one from torch's global
            state.
    """

    def __init__(self, seeds: int | Sequence[int] | None) -> None:
        if seeds is None:
            seeds = int(torch.randint(2**62, ()))
        self._seeds = int(seeds) if isinstance(seeds, int) else [int(seed) for seed in seeds]

    def draw(self, groups: int, count: int, *key: int) -> torch.Tensor:
        """``(groups, count)`` numbers in [0, 1), float64, on the CPU.

        Args:
            groups: how many.
            count: numbers a group.
            key: which of a run's draws this is.

        Raises:
            ValueError: another number of seeds.
        """
        seeds = [self._seeds + k for k in range(groups)] if isinstance(self._seeds, int) else self._seeds
        if len(seeds) != groups:
            raise ValueError(f"seeds has {len(seeds)} entries for {groups} groups of particles; give one a group")
        # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), all groups at once: its state is seed and key, mixed.
        state = _mixed(np.array([seed % 2**64 for seed in seeds], np.uint64) + _GOLDEN)
        for number in key:
            state = _mixed(state ^ np.uint64(number)) + _GOLDEN
        bits = _mixed(state[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every bit depends on every other; products wrap around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


class Population:
    """Log-weights of particles, and when and how they are resampled.

    Weights are carried over steps that do not resample. Nothing is read from the device: whether a group resamples is
    decided there.

    Args:
        particles: of each group, neighbours in the batch: a pipeline's ``num_images_per_prompt``.
        resampling: one of ``SCHEMES``.
        threshold: a group resamples when its effective sample size is below this share of ``particles``; 1 resamples
            whenever weights differ, 0 never.
        seeds: see ``GroupStreams``.

    Attributes:
        log_weights: ``(groups, particles)``, float64 (float32 on MPS); of the population as it stands.
        log_evidence: ``(groups,)``, logarithm of the estimate of the normalising constant: of the mean of the product
            of all weights. Its exponential is unbiased.
        lineage: ``(groups, particles)``, from which of the first particles each one descends.
        history: effective sample size ``(groups,)`` before each resampling, in the order of the run.

    Raises:
        ValueError: impossible options.
    """

    log_weights: torch.Tensor
    log_evidence: torch.Tensor
    lineage: torch.Tensor

    def __init__(
        self,
        particles: int,
        *,
        resampling: str = "systematic",
        threshold: float = 0.5,
        seeds: int | Sequence[int] | None = None,
    ) -> None:
        check_particles("particles", particles)
        if resampling not in SCHEMES:
            raise ValueError(f"resampling {resampling!r} is unknown; use one of {', '.join(SCHEMES)}")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold {threshold} must be from 0, which never resamples, to 1, which always does")
        self.particles, self.resampling, self.threshold, self.seeds = particles, resampling, threshold, seeds
        self.history: list[torch.Tensor] = []

    def start(self, batch: int, like: torch.Tensor) -> None:
        """Equal weights for a new run.

        Args:
            batch: number of samples.
            like: tensor on the device of the samples.

        Raises:
            ValueError: the batch is no number of whole groups.
        """
        groups = groups_of(batch, self.particles)
        self.log_weights = torch.zeros(groups, self.particles, dtype=precise(like), device=like.device)
        self.log_evidence = torch.zeros(groups, dtype=precise(like), device=like.device)
        self.lineage = torch.arange(self.particles, device=like.device).expand(groups, -1).contiguous()
        self.history = []
        self._streams = GroupStreams(self.seeds)

    def weigh(self, increments: torch.Tensor) -> None:
        """Multiplies weights.

        Args:
            increments: ``(batch,)``, their logarithms.
        """
        self.log_weights = self.log_weights + increments.to(self.log_weights).view_as(self.log_weights)

    def resample(self, index: int, *, threshold: float | None = None) -> torch.Tensor:
        """Resamples the groups that need it, and sets their weights equal.

        Args:
            index: of the step, for the random numbers.
            threshold: in the place of the population's own.

        Returns:
            ancestors ``(batch,)``, int64; those of other groups are the particles themselves.
        """
        groups, count = self.log_weights.shape
        threshold = self.threshold if threshold is None else threshold
        size = effective_sample_size(self.log_weights)
        self.history.append(size)
        # What rounding makes of equal weights is not below the size of the population.
        chosen = (size < threshold * count * (1.0 - 1e-6))[:, None]
        uniforms = self._streams.draw(groups, count, index).to(self.log_weights)
        own = torch.arange(count, device=chosen.device).expand(groups, -1)
        ancestors = torch.where(chosen, resample(self.log_weights, uniforms, self.resampling), own)
        self.log_evidence = self.log_evidence + torch.where(chosen[:, 0], self._log_mean(), 0.0)
        self.log_weights = torch.where(chosen, 0.0, self.log_weights)
        self.lineage = self.lineage.gather(1, ancestors)
        return (ancestors + count * torch.arange(groups, device=chosen.device)[:, None]).flatten()

    def finish(self) -> None:
        """Ends the run: the evidence takes in the weights that are left.

        Raises:
            ValueError: a weight is no number, as when the network diverges.
        """
        self.log_evidence = self.log_evidence + self._log_mean()
        if not bool(torch.isfinite(self.log_evidence).all()):
            raise ValueError(
                f"log_evidence is {self.log_evidence.tolist()}: the run's samples or weights left the finite numbers; "
                "take more steps, or weaker exponents and rewards"
            )

    @property
    def survivors(self) -> torch.Tensor:
        """``(groups,)``, how many of the first particles have descendants."""
        groups, count = self.lineage.shape
        alive = torch.zeros(groups, count, device=self.lineage.device, dtype=torch.int64)
        return alive.scatter_(1, self.lineage, 1).sum(1)

    def _log_mean(self) -> torch.Tensor:
        return self.log_weights.logsumexp(1) - math.log(self.log_weights.shape[1])


def warn_without_noise(run: GuidedRun, what: str) -> None:
    """Says where a run draws no noise, so that copies of a particle stay copies."""
    if not run.plan.is_stochastic:
        warnings.warn(
            f"{what} become equal and stay so: {run.plan.name!r} draws no noise; use a scheduler that does, such as "
            "DPMSolverPPScheduler with algorithm_type='sde-dpmsolver++'",
            RuntimeWarning,
            stacklevel=2,
        )


def check_particles(name: str, value: int) -> None:
    """Refuses what is no number of particles.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r} must be a whole number of at least 1, the pipeline's num_images_per_prompt")


def groups_of(batch: int, particles: int) -> int:
    """Number of groups in a batch.

    Raises:
        ValueError: the batch is no number of whole groups.
    """
    if batch % particles:
        raise ValueError(
            f"the batch of {batch} is no multiple of particles={particles}; call the pipeline with "
            f"num_images_per_prompt={particles}, or as many equal class labels"
        )
    return batch // particles
