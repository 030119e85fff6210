"""UniPC (arXiv 2302.04867): a predictor, and a corrector that costs no network call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .builder import PlanBuilder
from .grid import Grid
from .multistep import Corrector, Predictor, multistep, older
from .options import ScheduleConfig, own_options, scheduler_options
from .plan import Plan
from .registry import SAMPLERS, register
from .scheduler import PlanScheduler
from .weights import Measure, Node, Weights, lambda_weights, slope_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FOREIGN_FORMS = ("midpoint", "heun", "logrho", "tab", "rhoab", "rhork", "ipndm")


def step_orders(grid: Grid, order: int, start: int, lower_order_final: bool) -> list[int]:
    """The order of every step: a ramp at the start, one at the end (at any number of steps), 1 to sigma = 0."""
    orders = []
    for i in range(grid.steps):
        known = i - start + 1
        allowed = min(order, grid.steps - i) if lower_order_final else order
        orders.append(1 if grid.nodes[i + 1].sigma == 0.0 else max(1, min(allowed, known)))
    return orders


def predictor(grid: Grid, orders: Sequence[int], *, measure: Measure, form: str) -> Predictor:
    """UniP (arXiv 2302.04867, algorithm 2).

    Args:
        grid: the run's times.
        orders: of every step.
        measure: data or noise prediction.
        form: ``bh1`` or ``bh2``; it matters at order 2 only, where a shortcut takes the place of a linear system.
    """
    nodes = grid.nodes

    def rule(i: int, known: int) -> Weights:
        used = min(orders[i], known)
        past = older(nodes, i, used - 1)
        if used == 2:
            slope = _shortcut(nodes[i], nodes[i + 1], measure, form)
            return slope_weights(nodes[i], nodes[i + 1], past[0], slope, measure=measure)
        return lambda_weights(nodes[i], nodes[i + 1], past, measure=measure)

    return Predictor(measure, rule)


def corrector(grid: Grid, orders: Sequence[int], disabled: Sequence[int], *, measure: Measure, form: str) -> Corrector:
    """UniC (arXiv 2302.04867, algorithm 1): the step once more, with the prediction at its end.

    Args:
        grid: the run's times.
        orders: of every step; the corrector has one more.
        disabled: steps whose result is not corrected.
        measure: data or noise prediction.
        form: ``bh1`` or ``bh2``; it matters at order 1 only.
    """
    nodes = grid.nodes

    def rule(i: int, known: int) -> Weights | None:
        if i in disabled:
            return None
        start, target = nodes[i], nodes[i + 1]
        used = min(orders[i], known)
        if used == 1:
            slope = _shortcut(start, target, measure, form)
            weights = slope_weights(start, target, target, slope, measure=measure)
            if not math.isfinite(start.half_logsnr):
                # From alpha = 0 the step is infinite in lambda; B2 stays finite and halves the difference.
                half = weights.predictions[0] / 2
                return Weights(weights.state, (half, half))
            return Weights(weights.state, weights.predictions[::-1])
        weights = lambda_weights(start, target, [target, *older(nodes, i, used - 1)], measure=measure)
        first, new, *rest = weights.predictions
        return Weights(weights.state, (new, first, *rest))

    return rule


def _shortcut(start: Node, target: Node, measure: Measure, form: str) -> float:
    """The slope that ``a_1 = 1/2`` means with ``B(h)``: 1/2 for B2, and ``h / (2 (e^h - 1))`` with sign for B1."""
    if form == "bh2":
        return 0.5
    h = target.half_logsnr - start.half_logsnr
    if not math.isfinite(h):
        return 0.5
    z = -h if measure == "data" else h
    return 0.5 * z / math.expm1(z)


class UniPCScheduler(PlanScheduler):
    """UniPC (arXiv 2302.04867).

    Reads the config of diffusers' ``UniPCMultistepScheduler`` and gives its images. Where that class returns NaN, fails
    or ends with a step of no length (``bh1`` or full order down to sigma 0, re-spaced grids), this one takes the
    last step with first order, or ends the grid where the run ends.

    Args:
        solver_order: 1 to 4. Order 2 for guided sampling, 3 for unconditional.
        solver_type: ``bh1`` (unconditional, below 10 steps) or ``bh2``.
        predict_x0: data prediction, or noise prediction.
        lower_order_final: lower orders on the last steps.
        disable_corrector: steps whose result is not corrected; ``[0]`` or the first few at high guidance.
        solver_p: another predictor under the corrector: the name of a registered multistep sampler, or one of our
            schedulers. Its prediction then also is the corrector's.
        corrector_form: ``classic``, or ``delta``, which keeps what a callback changed in the sample.
        schedule: options of ``ScheduleConfig``.

    Raises:
        ValueError: unknown or contradicting options.
    """

    _flow_grid = "from_one"

    @scheduler_options()
    def __init__(
        self,
        *,
        solver_order: int = 2,
        solver_type: str = "bh2",
        predict_x0: bool = True,
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: str | PlanScheduler | None = None,
        corrector_form: str = "classic",
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        self._check()
        self._setup()

    def _check(self) -> None:
        """Checks the options of UniPC in the config, and translates foreign values."""
        config = self.config
        if config.solver_type in _FOREIGN_FORMS:
            self.register_to_config(solver_type="bh2")
        elif config.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type {config.solver_type!r} is unknown; use bh1 or bh2")
        if config.solver_order not in (1, 2, 3, 4):
            raise ValueError(f"solver_order {config.solver_order} must be 1, 2, 3 or 4")
        if config.corrector_form not in ("classic", "delta"):
            raise ValueError(f"corrector_form {config.corrector_form!r} is unknown; use classic or delta")
        self.register_to_config(disable_corrector=[int(i) for i in config.disable_corrector])
        if isinstance(config.solver_p, PlanScheduler):
            self.register_to_config(solver_p=_name_of(config.solver_p))
        if self.config.solver_p is not None:
            _predictor_options(self.config.solver_p)

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        chosen, rule = self._parts(plan, options)
        return multistep(plan, chosen, rule, form=options["corrector_form"])

    def _parts(self, plan: PlanBuilder, options: Mapping[str, Any]) -> tuple[Predictor, Corrector]:
        """What the plan is made of."""
        grid = plan.grid
        orders = step_orders(grid, options["solver_order"], plan.start, options["lower_order_final"])
        measure: Measure = "data" if options["predict_x0"] else "noise"
        form = options["solver_type"]
        if options["solver_p"] is None:
            chosen = predictor(grid, orders, measure=measure, form=form)
        else:
            sampler, own = _predictor_options(options["solver_p"])
            chosen = sampler._predictor(grid, {**options, **own})
            measure = chosen.measure
        return chosen, corrector(grid, orders, options["disable_corrector"], measure=measure, form=form)


def _predictor_options(name: str) -> tuple[PlanScheduler, dict[str, Any]]:
    """The scheduler that writes a registered multistep predictor, and its own options."""
    sampler = SAMPLERS.get(name)
    usable = [
        key
        for key, s in SAMPLERS.items()
        if hasattr(s.scheduler, "_predictor") and not s.stochastic and _plain(s.options)
    ]
    if sampler is None or name not in usable:
        raise ValueError(f"solver_p {name!r} is no deterministic multistep sampler; use one of {', '.join(usable)}")
    scheduler = sampler.scheduler(**sampler.options)
    return scheduler, own_options(scheduler.config)


def _plain(options: Mapping[str, Any]) -> bool:
    return options.get("method") != "singlestep" and options.get("solver_type") != "rhork"


def _name_of(scheduler: PlanScheduler) -> str:
    """The registered name with the same class and options as a scheduler."""
    for name, sampler in SAMPLERS.items():
        twin = sampler.scheduler(**sampler.options)
        if type(twin) is type(scheduler) and own_options(twin.config) == own_options(scheduler.config):
            return name
    raise ValueError("solver_p is a scheduler whose options no registered sampler has; register it and pass its name")


register("unipc", UniPCScheduler, order=3, paper="arXiv 2302.04867")
register("unipc-bh1", UniPCScheduler, order=3, paper="arXiv 2302.04867", solver_type="bh1")
register("unipc3", UniPCScheduler, order=4, paper="arXiv 2302.04867", solver_order=3)
register("unipc4", UniPCScheduler, order=5, paper="arXiv 2302.04867", solver_order=4)
