"""The scheduler of Feynman-Kac correctors: proposals for powers and products of models, and their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fewstep.samplers import Plan, PlanScheduler
from fewstep.samplers.builder import PlanBuilder, Value
from fewstep.samplers.guided import Guidance
from fewstep.samplers.options import ScheduleConfig, scheduler_options
from fewstep.samplers.weights import Node

from .corrector import Expert, FeynmanKacCorrector, GuidanceBranches
from .feynman_kac_steering import FeynmanKacSteering
from .populations import Population
from .potentials import Potential

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


def finite_variance_churn(total: float) -> float:
    """The least churn with which the weights of Gaussian data keep a finite variance over any range of noise.

    ``1 + churn >= (3 + 2 sqrt(2)) (G - 1) / G`` for a sum ``G`` of exponents; 0 where ``G <= 1``. The choices named in
    arXiv 2503.02819, churn 0 and ``1 / G - 1``, satisfy it up to 1.21 and 1.17 only.

    Args:
        total: sum of the exponents, above 0.
    """
    return max(0.0, (3.0 + 2.0 * math.sqrt(2.0)) * (total - 1.0) / total - 1.0)


def corrected_proposals(plan: PlanBuilder, *, total: float, churn: float, order: int) -> Plan:
    """The reverse SDE of ``q^total`` with more noise, exact where the clean prediction is constant or a line.

    With ``u = sigma^2 / alpha^2`` and ``y = x / alpha`` it is ``dy = a (y - m) du / u + sqrt(1 + churn) dW(u)`` (u
    downwards), ``a = (1 + churn / 2) total``, where ``m`` is the clean prediction; order 2 draws the line in ``log u``
    through the last two of them, flatter over steps longer than ``1 / a``. Without churn and with ``total`` 1 it is the
    SDE of DPM-Solver++.

    Args:
        plan: where to write.
        total: sum of the exponents; where it is not 1, the first call only scales the noise to its variance.
        churn: above -1; Langevin noise of any strength leaves the target alone.
        order: 1 or 2.
    """
    nodes, x = plan.grid.nodes, plan.initial
    if plan.start == 0 and total != 1.0:
        if nodes[0].alpha == 0.0:
            raise ValueError(
                f"exponents with the sum {total:g} cannot start from alpha = 0, where no variance is right; give "
                "timesteps or sigmas that begin below the noisiest one"
            )
        plan.evaluate(x, 0, "data")
        x = plan.combine([(x, total**-0.5)])
    older: tuple[Value, float] | None = None
    for i in range(plan.start, plan.grid.steps):
        m = plan.evaluate(x, i, "data")
        state, prediction, slope, noise, length = _coefficients(nodes[i], nodes[i + 1], total, churn)
        terms = [(x, state), (m, prediction)]
        if order == 2 and older is not None and math.isfinite(length) and math.isfinite(older[1]):
            terms += [(m, slope / older[1]), (older[0], -slope / older[1])]
        x = plan.combine(terms, noise=noise)
        older = m, length
    return plan.finish(x)


def _coefficients(start: Node, end: Node, total: float, churn: float) -> tuple[float, float, float, float, float]:
    """Of the state, the prediction, its slope in ``-log u`` and the noise; and the length in ``log u``."""
    a = (1.0 + 0.5 * churn) * total
    if start.alpha == 0.0 or end.sigma == 0.0:
        state, length = 0.0, math.inf
    else:
        length = 2.0 * (math.log(start.rho) - math.log(end.rho))
        state = math.exp(-a * length) * end.alpha / start.alpha
    gain = -math.expm1(-a * length)
    slope = 0.0
    if math.isfinite(length):
        # Over more than 1 / a, churn makes the last two predictions strangers: a line through them would mislead.
        slope = end.alpha * (length - gain / a) * min(1.0, 1.0 / (a * length))
    z = 2.0 * a - 1.0
    if end.sigma == 0.0:
        spread = 0.0
    elif z == 0.0:
        spread = length
    else:
        spread = -math.expm1(-z * length) / z
    return state, end.alpha * gain, slope, end.sigma * math.sqrt((1.0 + churn) * spread), length


class FeynmanKacScheduler(PlanScheduler):
    """Samples powers, geometric averages and products of models, as they are defined (arXiv 2503.02819).

    Following scaled or added scores does not: the particles of each prompt (``num_images_per_prompt=particles``) carry
    weights that correct it, and are resampled. What is sampled is ``prod q_i^exponents[i]``:

    - annealing: ``exponents=[beta]``;
    - classifier-free guidance as the geometric average ``q_u^(1-w) q_c^w``: ``exponents=[1]``, the guidance scale ``w``
      given to the pipeline, and ``correct_guidance(pipe)``, at no network call;
    - a product of models: ``exponents=[1, 1]`` and ``with_experts(other)``; an average ``[1 - b, b]`` alike. Each
      expert is called once a step;
    - any of it tilted by rewards: ``tilt(RewardTilt(reward))``.

    Weights grow with the number of dimensions: watch ``population.history``, the effective sample sizes. Exponents near
    1, an active interval of middle noise (``start``, ``stop``) and more particles help; outside the interval nothing is
    corrected.

    Variance preserving, EDM and flow models. Where the exponents do not sum to 1, noise of another variance is due than
    pipelines draw, and the first network call is spent on scaling it.

    Args:
        exponents: of the pipeline's own network and of the experts; their sum must be above 0.
        churn: additional Langevin noise, above -1, as a share of the reverse SDE's: it leaves the target alone and
            lowers the variance of the weights. ``None`` is ``finite_variance_churn`` of the sum of the exponents. In
            many dimensions, whose weights vary more, take more, until steps get too coarse for it: 5 to 12 is right for
            64 dimensions in 200 steps.
        solver_order: 1 or 2 (of the drift).
        particles: a group, the pipeline's ``num_images_per_prompt``.
        resampling: see ``FeynmanKacSteering``.
        threshold: see ``FeynmanKacSteering``.
        every: see ``FeynmanKacSteering``.
        start: see ``FeynmanKacSteering``.
        stop: see ``FeynmanKacSteering``.
        finish: see ``FeynmanKacSteering``.
        seeds: see ``FeynmanKacSteering``.
        schedule: options of ``ScheduleConfig``.

    Raises:
        ValueError: impossible or contradicting options.
    """

    @scheduler_options()
    def __init__(
        self,
        *,
        exponents: Sequence[float] = (1.0,),
        churn: float | None = None,
        solver_order: int = 2,
        particles: int = 8,
        resampling: str = "systematic",
        threshold: float = 0.5,
        every: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        finish: str = "resample",
        seeds: int | Sequence[int] | None = None,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        powers = [float(exponent) for exponent in exponents]
        if not powers or not all(map(math.isfinite, powers)) or not sum(powers) > 0.0:
            raise ValueError(f"exponents {list(exponents)} must be one a network, with a sum above 0")
        if churn is not None and not -1.0 < churn < math.inf:
            raise ValueError(f"churn {churn} must be above -1, at which copies never part; None chooses it")
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order {solver_order} must be 1 or 2")
        if self.config.preset is not None:
            raise ValueError(
                "preset was measured for ODE solvers; choose the spacing of a FeynmanKacScheduler yourself"
            )
        self.register_to_config(exponents=powers, seeds=seeds if seeds is None or isinstance(seeds, int) else [*seeds])
        self._setup()
        total = sum(powers)
        self._churn = finite_variance_churn(total) if churn is None else churn
        self._corrector = FeynmanKacCorrector(powers, churn=self._churn)
        self._steering = FeynmanKacSteering(
            [self._corrector],
            particles=particles,
            resampling=resampling,
            threshold=threshold,
            every=every,
            start=start,
            stop=stop,
            finish=finish,
            seeds=seeds,
        )
        super().guide(self._steering)

    @property
    def population(self) -> Population:
        """Weights, evidence, ancestry and effective sample sizes of the last run."""
        return self._steering.population

    def with_experts(self, *experts: Expert) -> Self:
        """Gives the networks of the further exponents.

        Args:
            experts: each a function of samples and time label that returns what the pipeline's own network would: of
                the same noise schedule, latents and prediction type. Such as ``Denoiser.from_pipeline(other, ...)``,
                with as many images a prompt.

        Returns:
            itself.

        Raises:
            ValueError: another number than exponents beside the first, or a denoiser of another process.
        """
        if len(experts) != len(self.config.exponents) - 1:
            raise ValueError(
                f"experts are {len(experts)} and exponents {list(self.config.exponents)}: one is the pipeline's own "
                "network, the others need one expert each"
            )
        for expert in experts:
            config = getattr(expert, "scheduler_config", None)
            if config is not None:
                self._check_process(config)
        self._corrector.experts = list(experts)
        return self

    def _check_process(self, config: Mapping[str, Any]) -> None:
        other = type(self).from_config(config)
        mine, theirs = self.schedule, other.schedule
        levels = (mine.training_levels(), theirs.training_levels())
        same = mine.kind == theirs.kind and len(levels[0]) == len(levels[1]) and bool((levels[0] == levels[1]).all())
        if not same or self.config.prediction_type != other.config.prediction_type:
            raise ValueError(
                f"an expert was trained on another process ({theirs.kind}, {other.config.prediction_type}) than the "
                f"scheduler's ({mine.kind}, {self.config.prediction_type}); their densities have no common path"
            )

    def correct_guidance(self, pipeline: Any) -> Self:
        """Takes the pipeline's guided prediction for the geometric average of its two branches, and corrects it.

        Args:
            pipeline: whose ``unet`` or ``transformer`` is watched from now on; ``None`` ends it.

        Returns:
            itself.

        Raises:
            ValueError: a pipeline without such a network.
        """
        if self._corrector.branches is not None:
            self._corrector.branches.remove()
        self._corrector.branches = None if pipeline is None else GuidanceBranches(pipeline)
        return self

    def tilt(self, *potentials: Potential) -> Self:
        """Multiplies the density by further potentials, in the place of those given before.

        Args:
            potentials: such as ``RewardTilt``.

        Returns:
            itself.
        """
        self._steering.potentials = [self._corrector, *potentials]
        return self

    def guide(self, guidance: Guidance | None) -> Self:
        """Refuses: the scheduler has its own guidance.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "guidance would take the place of the scheduler's correctors; use tilt(RewardTilt(reward)) for rewards, or "
            "guide another scheduler"
        )

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        total = sum(options["exponents"])
        return corrected_proposals(plan, total=total, churn=self._churn, order=options["solver_order"])
