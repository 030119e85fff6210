"""Heavy-ball momentum, HB (arXiv 2307.11118), on any deterministic multistep solver.

A multistep method moves ``x / alpha`` along a direction made of noise predictions, or ``x / sigma`` along one made of
clean predictions. High guidance makes that motion stiff: with few steps it oscillates, and images get over-saturated
spots. Momentum damps the direction, never the sample, at no network call:

    v_{n+1} = (1 - beta) v_n + beta d_n,    and the step goes along v_{n+1} instead of the solver's direction d_n

The damping coefficient ``beta = 1`` is the solver itself; below 1 the stable region widens by ``(2 - beta) / beta``
and the order of convergence is 1 (theorem 1). ``ghvb.py`` keeps the order, ``stability.py`` has both limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .builder import PlanBuilder, Value
from .multistep import Corrector, CorrectorForm, Predictor
from .options import ScheduleConfig, own_options, scheduler_options
from .plan import Plan
from .registry import SAMPLERS, register
from .scheduler import PlanScheduler
from .unipc import UniPCScheduler
from .weights import Measure, Weights, lambda_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class _Velocity:
    """``scale * v``: in the units of the step that made it, so that a damping of 1 changes no coefficient."""

    value: Value
    scale: float


def heavy_ball(
    plan: PlanBuilder,
    predictor: Predictor,
    damping: float,
    corrector: Corrector | None = None,
    *,
    form: CorrectorForm = "classic",
) -> Plan:
    """Writes the plan of a multistep solver with HB momentum (arXiv 2307.11118).

    The first velocity is the first direction, so the first step is plain. So is a last step that the solver takes with
    first order (to ``sigma = 0``, or by ``lower_order_final``), as in the authors' DPM-Solver++: no oscillation
    follows, and old directions would only blur the result.

    A corrector has a velocity of its own, which begins as the predictor's. (The released UniPC with HB averages
    directions divided by ``sigma_t``, which changes from step to step, and overwrites the predictor's velocity.)

    Args:
        plan: where to write.
        predictor: a deterministic solver on data or noise predictions.
        damping: ``beta`` in (0, 1]; 1 gives the solver's own plan.
        corrector: of the solver.
        form: see ``multistep``.
    """
    grid = plan.grid
    x = base = plan.initial
    history: list[Value] = []
    last: Weights | None = None
    # Before the last step, after it, and after its correction.
    before: _Velocity | None = None
    velocity: _Velocity | None = None
    corrected: _Velocity | None = None

    def moved(
        values: Sequence[Value], weights: Sequence[float], scale: float, old: _Velocity | None, share: float
    ) -> _Velocity:
        terms = [(value, share * weight) for value, weight in zip(values, weights, strict=False)]
        if old is not None:
            terms.append((old.value, (1.0 - share) * (scale / old.scale)))
        return _Velocity(plan.combine(terms), scale)

    for i in range(plan.start, grid.steps):
        node, target = grid.nodes[i], grid.nodes[i + 1]
        # At alpha = 0 the noise prediction is the sample itself: only the data form tells where to go.
        measure: Measure = "data" if node.alpha == 0.0 else predictor.measure
        m = plan.evaluate(x, i, measure)
        weights = corrector(i - 1, len(history)) if corrector and history else None
        if weights is None or last is None or velocity is None:
            base, corrected = x, None
        else:
            share = 1.0 if before is None else damping
            if form == "classic":
                old = before if corrected is None else corrected
                corrected = moved([m, *history], weights.predictions, velocity.scale, old, share)
                base = plan.combine([(base, weights.state), (corrected.value, 1.0)])
            else:
                # The same by differences: kept is how far the corrector's velocity is ahead of the predictor's.
                changes = [c - p for c, p in zip_longest(weights.predictions, (0.0, *last.predictions), fillvalue=0.0)]
                corrected = moved([m, *history], changes, velocity.scale, corrected, share)
                base = plan.combine([(x, 1.0), (corrected.value, 1.0)])
        if measure != predictor.measure:
            first = lambda_weights(node, target, (), measure=measure)
            x = plan.combine([(base, first.state), (m, first.predictions[0])])
            continue
        history.insert(0, m)
        last = predictor.rule(i, len(history))
        order = sum(1 for weight in last.predictions if weight != 0.0)
        plain = velocity is None or (order == 1 and i == grid.steps - 1)
        scale = math.fsum(last.predictions)
        before, velocity = velocity, moved(history, last.predictions, scale, velocity, 1.0 if plain else damping)
        x = plan.combine([(base, last.state), (velocity.value, 1.0)])
    return plan.finish(x)


class HeavyBallScheduler(PlanScheduler):
    """HB momentum on a multistep solver (arXiv 2307.11118).

    For guidance scales at which the solver alone shows divergence artifacts. The authors use a damping of 0.9 on PLMS4
    and of 0.8 to 0.9 on DPM-Solver++ at a guidance of 7.5, and 0.6 at 22.5; below 0.5 images blur.

    Args:
        damping: ``beta`` in (0, 1]; 1 is the solver without momentum.
        solver: the name of a registered sampler: a deterministic multistep one, or a UniPC.
        solver_options: other values of the solver's own options, such as ``{"solver_order": 2}``.
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is the solver's by default.

    Raises:
        ValueError: a damping outside (0, 1], a solver that is no multistep one, or options that it does not have.
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(
        self,
        *,
        damping: float = 0.8,
        solver: str = "dpm++",
        solver_options: Mapping[str, Any] | None = None,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if not 0.0 < damping <= 1.0:
            raise ValueError(f"damping {damping} must lie in (0, 1]; 1 is no momentum, 0.8 is usual")
        self._base = self._solver(solver, solver_options)
        if self.config.final_sigmas_type is None:
            self.register_to_config(final_sigmas_type=self._base.config.final_sigmas_type)
        self._setup()

    def _solver(self, name: str, options: Mapping[str, Any] | None) -> PlanScheduler:
        """The solver's own scheduler on the same model: it checks the options and completes them."""
        usable = [key for key, sampler in SAMPLERS.items() if _is_multistep(sampler.scheduler, sampler.options)]
        if name not in usable:
            raise ValueError(f"solver {name!r} is no deterministic multistep sampler; use one of {', '.join(usable)}")
        base = SAMPLERS[name].within(self.config, options)
        if not _is_multistep(type(base), base.config):
            raise ValueError(
                f"solver_options {dict(options or {})} make {name!r} a singlestep or stochastic sampler, which has no "
                "momentum form; leave them out"
            )
        return base

    def _options(self, steps: int | None) -> dict[str, Any]:
        # The times are the solver's too.
        options = super()._options(steps)
        options.update(own_options(self._base.config), flow_grid=self._base._flow_grid)
        return options

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        options = {**options, **own_options(self._base.config)}
        predictor, corrector = _parts(self._base, plan, options)
        form = options.get("corrector_form", "classic")
        return heavy_ball(plan, predictor, options["damping"], corrector, form=form)


def _is_multistep(scheduler: type[PlanScheduler], options: Mapping[str, Any]) -> bool:
    """Whether a scheduler with these options is a deterministic multistep solver."""
    stochastic = str(options.get("algorithm_type", "")).startswith("sde-")
    other = options.get("method") == "singlestep" or options.get("solver_type") == "rhork"
    return (scheduler is UniPCScheduler or hasattr(scheduler, "_predictor")) and not stochastic and not other


def _parts(base: PlanScheduler, plan: PlanBuilder, options: Mapping[str, Any]) -> tuple[Predictor, Corrector | None]:
    """What a multistep scheduler hands to ``multistep``."""
    if not isinstance(base, UniPCScheduler):
        predictor: Predictor = base._predictor(plan.grid, options)
        return predictor, None
    return base._parts(plan, options)


def _register() -> None:
    for solver, damping in {"dpm++": 0.8, "ipndm": 0.9, "unipc": 0.9}.items():
        options = {"solver": solver, "damping": damping}
        register(f"hb-{solver}", HeavyBallScheduler, order=1, paper="arXiv 2307.11118", **options)


_register()
