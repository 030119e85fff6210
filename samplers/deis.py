"""DEIS (arXiv 2204.13902): exponential integrators on the noise prediction, in all their forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .builder import PlanBuilder, Value
from .grid import Grid
from .multistep import Predictor, final_order, multistep, older
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .registry import register
from .scheduler import PlanScheduler
from .weights import Measure, Weights, close, lambda_weights, noise_zeroth_moment, polynomial_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FORMS = ("logrho", "tab", "rhoab", "rhork", "ipndm")
_FOREIGN_FORMS = ("midpoint", "heun", "bh1", "bh2")

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of equidistant Adams-Bashforth, newest first: iPNDM (arXiv 2202.09778, equation 9)."""

# Runge-Kutta tableaus in rho (arXiv 2204.13902, section 4): nodes, matrix, weights.
_TABLEAUS: Mapping[int, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    2: ((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    3: ((0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    4: ((0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def predictor(grid: Grid, *, order: int, form: str, lower_order_final: bool) -> Predictor:
    """Adams-Bashforth forms of DEIS.

    Args:
        grid: the run's times.
        order: number of nodes, 1 to 4 (the paper counts polynomial degrees: tAB3 has order 4).
        form: the variable in which the noise prediction is a polynomial: ``tab`` in time, ``rhoab`` in
            ``sigma / alpha``, ``logrho`` in its logarithm; ``ipndm`` takes the weights of an equidistant grid.
        lower_order_final: lower orders at the end, below 15 steps.
    """
    nodes, schedule = grid.nodes, grid.schedule
    times = schedule.time(grid.levels) if form == "tab" else None

    def rule(i: int, known: int) -> Weights:
        start, target = nodes[i], nodes[i + 1]
        # Only the form in log rho diverges at sigma = 0.
        end_first = form == "logrho" and target.sigma == 0.0
        wanted = final_order(order, i, grid.steps, lower_order_final=lower_order_final, end_first=end_first)
        used = min(wanted, known)
        past = older(nodes, i, used - 1)
        if form == "logrho":
            return lambda_weights(start, target, past, measure="noise")
        zeroth = noise_zeroth_moment(start, target)
        state = target.alpha / start.alpha
        if form == "ipndm":
            return Weights(state, tuple((zeroth * np.array(ADAMS_BASHFORTH[used])).tolist()))
        if times is not None:
            points = [float(times[k]) for k in range(i, i - used, -1)]
            abscissae, weights, _ = schedule.rho_of_time(float(times[i]), float(times[i + 1]))
        else:
            points = [node.rho for node in (start, *past)]
            abscissae, weights = _gauss(start.rho, target.rho)
        integrals = target.alpha * polynomial_weights(points, (abscissae, weights))
        return Weights(state, tuple(close(integrals, zeroth).tolist()))

    return Predictor("noise", rule)


def runge_kutta(plan: PlanBuilder, *, order: int) -> Plan:
    """rhoRK-DEIS: Runge-Kutta on ``d(x / alpha) / d rho = eps``; Heun (2), Kutta (3), classical (4).

    A step takes ``order`` network calls; the one that ends at ``sigma = 0``, and one that starts at ``alpha = 0``,
    takes one and is of first order, since there is nothing to evaluate there.
    """
    nodes = plan.grid.nodes
    abscissae, matrix, weights = _TABLEAUS[order]
    x = plan.initial
    for i in range(plan.start, plan.grid.steps):
        start, target = nodes[i], nodes[i + 1]
        measure: Measure = "data" if start.alpha == 0.0 else "noise"
        slopes: list[Value] = [plan.evaluate(x, i, measure)]
        if target.sigma == 0.0 or start.alpha == 0.0:
            first = lambda_weights(start, target, (), measure=measure)
            x = plan.combine([(x, first.state), (slopes[0], first.predictions[0])])
            continue
        width = noise_zeroth_moment(start, target) / target.alpha
        for c, row in zip(abscissae[1:], matrix[1:], strict=True):
            rho = start.rho + c * width
            stage = target if c == 1.0 else plan.node_at_rho(rho)
            terms = zip(slopes, row, strict=True)
            u = plan.combine([(x, stage.alpha / start.alpha), *((k, stage.alpha * width * a) for k, a in terms)])
            at_node = c == 1.0 and i + 1 < plan.grid.steps
            slopes.append(plan.evaluate(u, i + 1, "noise") if at_node else plan.evaluate_at_rho(u, rho, "noise"))
        ends = ((k, target.alpha * width * b) for k, b in zip(slopes, weights, strict=True))
        x = plan.combine([(x, target.alpha / start.alpha), *ends])
    return plan.finish(x)


def _gauss(lower: float, upper: float) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(4)
    return (lower + upper) / 2 + (upper - lower) / 2 * points, (upper - lower) / 2 * weights


class DEISScheduler(PlanScheduler):
    """DEIS (arXiv 2204.13902) and iPNDM (arXiv 2202.09778).

    Reads the config of diffusers' ``DEISMultistepScheduler`` and gives its images (``solver_type="logrho"``). Where
    that class ends with a network call for a step of no length (Karras, exponential, beta and flow grids; a flow
    run then still holds noise), this one ends at ``sigma_min``, and flow runs at 0.

    Args:
        solver_order: 1 to 4; the paper's tAB3 and rhoAB3 have order 4. Runge-Kutta forms: 2 (Heun), 3 (Kutta) or 4.
        solver_type: ``logrho`` (diffusers' form), ``tab`` (the paper's recommendation), ``rhoab``, ``rhork`` or
            ``ipndm``.
        algorithm_type: ``deis``, the name that diffusers' config uses.
        lower_order_final: lower orders on the last steps, below 15 steps (multistep forms).
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is ``sigma_min`` by default, and ``zero`` for
            flow models.

    Raises:
        ValueError: unknown or contradicting options.
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(
        self,
        *,
        solver_order: int = 2,
        solver_type: str = "logrho",
        algorithm_type: str = "deis",
        lower_order_final: bool = True,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if algorithm_type in ("dpmsolver", "dpmsolver++", "data_prediction", "noise_prediction"):
            self.register_to_config(algorithm_type="deis")
        elif algorithm_type != "deis":
            raise ValueError(
                f"algorithm_type {algorithm_type!r} is not a form of DEIS, which solves the ODE; use 'deis'"
            )
        if solver_type in _FOREIGN_FORMS:
            self.register_to_config(solver_type="logrho")
        elif solver_type not in _FORMS:
            raise ValueError(f"solver_type {solver_type!r} is unknown; use one of {', '.join(_FORMS)}")
        orders = tuple(_TABLEAUS) if self.config.solver_type == "rhork" else tuple(ADAMS_BASHFORTH)
        if solver_order not in orders:
            raise ValueError(f"solver_order {solver_order} of {self.config.solver_type} must be one of {orders}")
        if self.config.final_sigmas_type is None:
            self.register_to_config(final_sigmas_type="zero" if self.config.use_flow_sigmas else "sigma_min")
        self._setup()
        if self.config.solver_type == "rhork" and self.config.preset is None:
            self.order = self.config.solver_order

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        if options["solver_type"] == "rhork":
            return runge_kutta(plan, order=options["solver_order"])
        return multistep(plan, self._predictor(plan.grid, options))

    def _predictor(self, grid: Grid, options: Mapping[str, Any]) -> Predictor:
        return predictor(
            grid,
            order=options["solver_order"],
            form=options["solver_type"],
            lower_order_final=options["lower_order_final"],
        )


def _register() -> None:
    paper = "arXiv 2204.13902"
    register("deis", DEISScheduler, order=2, paper=paper)
    register("deis3", DEISScheduler, order=3, paper=paper, solver_order=3)
    for form in ("tab", "rhoab"):
        for degree in range(1, 4):
            name, options = f"deis-{form}{degree}", {"solver_type": form, "solver_order": degree + 1}
            register(name, DEISScheduler, order=degree + 1, paper=paper, lower_order_final=False, **options)
    for order, name in {2: "deis-heun", 3: "deis-kutta3", 4: "deis-rk4"}.items():
        register(name, DEISScheduler, order=order, paper=paper, solver_type="rhork", solver_order=order)
    # Weights of an equidistant grid: of second order on any other.
    options = {"solver_type": "ipndm", "solver_order": 4, "lower_order_final": False}
    register("ipndm", DEISScheduler, order=2, paper="arXiv 2202.09778", **options)


_register()
